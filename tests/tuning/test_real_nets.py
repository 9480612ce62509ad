"""The loop on restructured networks: a residual one on images, PointNet++ on torch-geometric batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, static_twin
from sigmab_plugin.models import cifar_resnet18
from sigmab_plugin.tuning import TrainRecipe, evaluate, finetune, reestimate_batchnorm

RECIPE = TrainRecipe(
    optimizer="adam", lr=2e-3, schedule="constant", warmup_epochs=0.0, label_smoothing=0.0, batch_size=16
)


def textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three-channel images (B, 3, 8, 8) of four textures with noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(4, (count,), generator=generator)
    wave, flat = torch.tensor([1.0, -1.0]).repeat(4), torch.ones(8)
    pairs = ((flat, flat), (wave, flat), (flat, wave), (wave, wave))
    patterns = torch.stack([torch.outer(a, b) for a, b in pairs])[targets].unsqueeze(1)
    return patterns + 0.7 * torch.randn(count, 3, 8, 8, generator=generator), targets


def batches(data: tuple[Tensor, Tensor], size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


@pytest.mark.slow
def test_a_restructured_resnet_recovers_and_so_does_its_twin() -> None:
    train, held_out = batches(textures(96, 0)), batches(textures(64, 1))
    dense = cifar_resnet18(4, width=0.125)
    finetune(dense, train, epochs=4, recipe=RECIPE, progress=False)
    config = SigmaBConfig(levels=("layer3", "layer4"), head="fc", projection_dim=8)
    example = torch.zeros(2, 3, 8, 8)
    net = SigmaBPruner(dense.eval(), example, calibration_data=train, config=config).step()
    twin = static_twin(dense, example, config=config, calibration_data=train)
    recipe = RECIPE.replace(distillation_weight=1.0, bn_reestimation=True, grad_clip=5.0)
    for network in (net, twin):
        history = finetune(
            network, train, epochs=4, recipe=recipe, val_loader=held_out, teacher=dense, progress=False
        )
        assert history.best_accuracy is not None
        assert history.best_accuracy > 0.8
    assert evaluate(net, held_out).balance is not None


def clouds(count: int, seed: int) -> list[Any]:
    """Points on a sphere, in a cube, or in a flat disc."""
    data = pytest.importorskip("torch_geometric.data")
    generator = torch.Generator().manual_seed(seed)
    result = []
    for number in range(count):
        points = torch.randn(64, 3, generator=generator)
        kind = number % 3
        if kind == 0:
            points = nn.functional.normalize(points, dim=1)
        elif kind == 1:
            points = points.clamp(-1, 1)
        else:
            points[:, 2] = 0
        points /= points.norm(dim=1).max()
        result.append(data.Data(pos=points, y=torch.tensor([kind])))
    return result


def point_tree() -> tuple[SigmaBNet, Any]:
    loaders = pytest.importorskip("torch_geometric.loader")
    from sigmab_plugin.models import PointNet2

    torch.manual_seed(0)
    loader = loaders.DataLoader(clouds(48, 0), batch_size=12, shuffle=True)
    dense = PointNet2(3, width=0.125, centres=(16, 8), neighbours=(8, 8), radii=(0.5, 0.9)).eval()
    config = SigmaBConfig(levels=("sa3", "fc1"), head="head", projection_dim=8)
    calibration = [(batch.pos, batch.batch) for batch in loader]
    net = SigmaBPruner(dense, calibration[0], calibration_data=calibration, config=config).step()
    return net, loader


def test_point_clouds_as_torch_geometric_batches_and_as_arguments() -> None:
    net, loader = point_tree()
    held_out = [((batch.pos, batch.batch), batch.y) for batch in loader]
    recipe = RECIPE.replace(lr=5e-3, bn_reestimation=True)
    history = finetune(net, loader, epochs=8, recipe=recipe, val_loader=held_out, progress=False)
    assert history.last.samples == 48
    assert history.last.train_loss < history.records[0].train_loss
    assert history.best_accuracy is not None
    assert history.best_accuracy > 0.6
    assert evaluate(net, loader).accuracy == evaluate(net, held_out).accuracy


def test_batchnorm_of_point_clouds_comes_from_the_clouds_of_each_branch() -> None:
    net, loader = point_tree()
    data = [((batch.pos, batch.batch), batch.y) for batch in loader]
    reestimate_batchnorm(net, data)
    net.eval()
    module = net.specializers["0"]
    first = next(m for m in module.modules() if isinstance(m, nn.BatchNorm1d))
    seen: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for (pos, cloud), _ in data:
            frontier = net.backbone(pos, cloud)
            branch = net.routers["root"](net.modality.pool(frontier)).argmax(1)
            rows = (branch == 0).nonzero().flatten()
            if len(rows):
                module(*net.modality.take(frontier, rows))
    handle.remove()
    values = torch.cat(seen)
    torch.testing.assert_close(first.running_mean, values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, values.var(0), rtol=1e-4, atol=1e-5)
