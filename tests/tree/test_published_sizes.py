"""The integers of the published trees (arXiv 2606.09924), routers and projections counted."""

from __future__ import annotations

import pytest
import torch

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner
from sigmab_plugin.counting import parameter_count
from sigmab_plugin.models import cifar_resnet50, imagenet_resnet50


def _restructured(model: torch.nn.Module, preset: str, batches: list) -> SigmaBNet:
    config = SigmaBConfig.preset(preset)
    return SigmaBPruner(model, batches[0], config=config, calibration_data=batches).step()


def test_cifar_resnet50() -> None:
    batches = [torch.randn(8, 3, 32, 32) + torch.randn(8, 3, 1, 1)]
    net = _restructured(cifar_resnet50(100), "resnet50", batches)
    counts = net.parameter_counts()
    assert (counts.total, counts.active) == (25_549_594, 9_405_834)
    assert set(counts.per_path.values()) == {9_405_834}
    assert net.macs(batches[0][:1]).active == pytest.approx(0.888e9, rel=0.01)


@pytest.mark.slow
def test_imagenet_resnet50() -> None:
    batches = [torch.randn(8, 3, 64, 64) + torch.randn(8, 3, 1, 1)]
    net = _restructured(imagenet_resnet50(1000), "resnet50", batches)
    counts = net.parameter_counts()
    assert (counts.total, counts.active) == (29_247_274, 10_336_014)
    assert counts.backbone == 1_444_928
    assert counts.routers == 252_806
    assert parameter_count(net.specializers["0"]) == 3_688_418
    assert parameter_count(net.specializers["0_0"]) == 4_018_176
    assert parameter_count(net.heads["0_0"]) == 1_025_000
    assert parameter_count(net.routers["root"], net.routers["1"]) == 159_492
    assert net.macs(torch.randn(1, 3, 224, 224)).active == pytest.approx(2.834e9, rel=0.01)


def test_pointnet2() -> None:
    pytest.importorskip("torch_geometric")
    from sigmab_plugin.models import PointNet2

    batch = torch.arange(6).repeat_interleave(64)
    scale = torch.tensor([[1.0, 1, 0.1], [0.1, 1, 1], [1, 0.3, 0.3]])
    clouds = [(torch.randn(len(batch), 3) * scale[batch % 3], batch) for _ in range(2)]
    counts = _restructured(PointNet2(40), "pointnet2", clouds).parameter_counts()
    assert (counts.total, counts.active) == (1_459_046, 616_428)
