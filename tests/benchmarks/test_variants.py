"""Candidates that the library does not have: each changes the one thing that its row says."""

from __future__ import annotations

import pytest
import torch

from sigmab_plugin import SigmaBNet, SigmaBPruner
from sigmab_plugin.tree.modality import modality

from ..zoo import CASES

pytest.importorskip("torch_geometric")  # one package holds all experiments


def _built(name: str, builder: str | None, **changes: object) -> tuple[SigmaBNet, list]:
    from accuracy.variants import build_variant

    case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    model, data = case.model(), case.batches()
    pruner = SigmaBPruner(model, data[0], calibration_data=data, config=case.config.replace(**changes))
    return (build_variant(builder, pruner.prepared, data) if builder else pruner.step()), data


@pytest.mark.parametrize("case", ["resnet50", "pointnet2"])
@pytest.mark.parametrize("builder", ["pooled-deviation", "trained-projection", "shared-0.25-0.75"])
def test_a_variant_routes_and_trains_as_any_tree(case: str, builder: str) -> None:
    net, data = _built(case, builder, repair="least_squares")
    soft, probabilities = net.forward_leaves(data[0])
    (soft * probabilities.exp().unsqueeze(-1)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.routers.parameters())
    net.eval()
    logits, leaf = net.forward_routed(data[0])
    every, _ = net.forward_leaves(data[0])
    torch.testing.assert_close(logits, every[torch.arange(len(leaf)), leaf], atol=1e-5, rtol=1e-4)
    plain, _ = _built(case, None)
    sizes = [tree.parameter_counts() for tree in (net, plain)]
    assert len({counts.total - counts.routers for counts in sizes}) == 1


def test_deviation_is_of_each_sample_and_channel() -> None:
    from accuracy.variants import MeanAndDeviation

    image = torch.randn(3, 5, 4, 4)
    pooled = MeanAndDeviation(modality("images")).pool(image)
    torch.testing.assert_close(pooled[:, :5], image.mean((2, 3)))
    torch.testing.assert_close(pooled[:, 5:], image.flatten(2).std(2, unbiased=False))
    x, batch = torch.randn(9, 5), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
    pooled = MeanAndDeviation(modality("points")).pool((x, torch.randn(9, 3), batch))
    expected = torch.stack([x[:4].std(0, unbiased=False), x[4:].std(0, unbiased=False)])
    torch.testing.assert_close(pooled[:, 5:], expected)


def test_routers_see_the_deviation() -> None:
    net, data = _built("resnet50", "pooled-deviation")
    plain, _ = _built("resnet50", None)
    for key, router in net.routers.items():
        assert router.projection.linear.in_features == 2 * plain.routers[key].projection.linear.in_features
    frontier = net.backbone(data[0])
    flat = frontier.mean((2, 3), keepdim=True).expand_as(frontier)
    logits = [net.routers["root"](net.modalities[0].pool(value)) for value in (frontier, flat)]
    assert not torch.allclose(*logits, atol=1e-3)


def test_trained_directions_are_those_that_tell_the_logits() -> None:
    from accuracy.variants import _directions

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    # Large features that tell nothing, small ones of which two combinations tell all.
    x[:, :4] *= 10
    y = x[:, 4:] @ torch.randn(2, 7, generator=generator, dtype=torch.float64)
    weight, centre = _directions(x, y, 3)
    torch.testing.assert_close(centre, x.mean(0))
    assert float(weight[:2, :4].abs().max()) < 1e-2 * float(weight[:2, 4:].abs().max())
    assert float(weight[2].abs().max()) < 1e-2 * float(weight[:2].abs().max())  # two directions are all


def test_each_level_shares_its_own_ratio() -> None:
    net, _ = _built("resnet50", "shared-0.25-0.75")
    for path, ratio in (("", 0.25), ("0", 0.75), ("1", 0.75)):
        split = net.plan.splits[path]
        for group, shared in split.shared.items():
            width = len(net.plan.branches[f"{path}/0" if path else "0"].keep[group])
            assert len(shared) == int(ratio * width)
    assert net.config.shared_ratio == 0.5
