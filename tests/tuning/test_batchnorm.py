"""Re-estimated statistics against ones computed by hand, and nothing else touched."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.errors import TrainingError
from sigmab_plugin.tree.net import SigmaBNet
from sigmab_plugin.tuning import reestimate_batchnorm
from sigmab_plugin.tuning.batches import sample_count

from .nets import dense, loader, same, samples, state, tree


def scrambled(net: SigmaBNet) -> SigmaBNet:
    """Routers that split the data in halves, and statistics far from the data's."""
    images, targets = samples(200)
    reestimate_batchnorm(net, [(images, targets)], per_leaf=False)
    net.eval()
    frontiers = {"root": net.backbone(images)}
    for branch in "01":
        frontiers[branch] = net.specializers[branch](frontiers["root"])
    for key, frontier in frontiers.items():
        logits = net.routers[key](net.modality.pool(frontier))
        with torch.no_grad():
            net.routers[key].linear.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(1 + torch.rand(module.num_features, generator=generator))
    return net


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.mean((0, 2, 3)), values.var((0, 2, 3))


def check(norm: nn.Module, values: Tensor) -> None:
    mean, variance = statistics(values)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=1e-5)


def test_plain_module_in_one_batch_equals_the_batch_statistics() -> None:
    net = dense()
    images, targets = samples(64)
    reestimate_batchnorm(net, [(images, targets)])
    first = net[0][0](images)
    check(net[0][1], first)
    mean, variance = first.mean((0, 2, 3), keepdim=True), first.var((0, 2, 3), correction=0, keepdim=True)
    check(net[1][1], net[1][0](torch.relu((first - mean) / (variance + 1e-5).sqrt())))


def test_first_layer_is_exact_over_uneven_batches() -> None:
    net = dense()
    images, targets = samples(64)
    batches = [(images[a:b], targets[a:b]) for a, b in ((0, 40), (40, 47), (47, 64))]
    reestimate_batchnorm(net, batches)
    check(net[0][1], net[0][0](images))


def test_every_leaf_sees_its_own_samples() -> None:
    net = scrambled(tree())
    images, targets = samples(200)
    net.eval()
    reestimate_batchnorm(net, [(images, targets)])
    leaves = net.route(images)
    assert len(leaves.unique()) >= 3
    frontier = net.backbone(images)
    check(net.backbone[1], net.backbone[0](images))
    for branch in (0, 1):
        rows = (leaves // 2 == branch).nonzero().flatten()
        if not len(rows):
            continue
        module = net.specializers[str(branch)]
        check(module[1], module[0](frontier[rows]))
        below = module(frontier[rows])
        for leaf in (0, 1):
            mine = (leaves[rows] == 2 * branch + leaf).nonzero().flatten()
            if len(mine) > 1:
                module = net.specializers[f"{branch}_{leaf}"]
                check(module[1], module[0](below[mine]))


def test_all_samples_for_every_leaf_on_request() -> None:
    net = scrambled(tree())
    images, targets = samples(64)
    reestimate_batchnorm(net, [(images, targets)], per_leaf=False)
    check(net.backbone[1], net.backbone[0](images))
    raw = net.backbone[0](images)
    mean, variance = raw.mean((0, 2, 3), keepdim=True), raw.var((0, 2, 3), correction=0, keepdim=True)
    frontier = torch.relu((raw - mean) / (variance + 1e-5).sqrt())
    for branch in "01":
        check(net.specializers[branch][1], net.specializers[branch][0](frontier))


def test_only_the_statistics_change_and_twice_gives_the_same() -> None:
    nets = [scrambled(tree(dropout=0.5)) for _ in range(2)]
    before = state(nets[0])
    nets[0].train()
    nets[0].heads["0_0"].eval()
    modes = [module.training for module in nets[0].modules()]
    torch.manual_seed(3)
    for net in nets:
        torch.randn(7)
        reestimate_batchnorm(net, loader())
    after = state(nets[0])
    assert same(after, state(nets[1]))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed)
    assert [module.training for module in nets[0].modules()] == modes
    assert nets[0].routing == "auto"
    norms = [m for m in nets[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.track_running_stats and not norm._forward_pre_hooks for norm in norms)


def test_a_branch_without_samples_keeps_its_statistics(caplog: pytest.LogCaptureFixture) -> None:
    net = scrambled(tree())
    with torch.no_grad():
        net.routers["root"].linear.bias.copy_(torch.tensor([1e3, 0.0]))
    before = state(net.specializers["1"])
    with caplog.at_level(logging.WARNING):
        reestimate_batchnorm(net, loader())
    assert same(state(net.specializers["1"]), before)
    warned = [record.getMessage() for record in caplog.records]
    assert any("branch 1 keeps its statistics" in text for text in warned)


def test_points_are_joined_across_batches() -> None:
    """Routed parts of several batches run together: cloud indices go on where the last part ended."""
    from sigmab_plugin.tree.modality import Points

    parts = [
        (torch.ones(3, 2), torch.zeros(3, 3), torch.tensor([0, 0, 1])),
        (torch.full((2, 2), 2.0), torch.zeros(2, 3), torch.tensor([0, 1])),
    ]
    x, pos, batch = Points().join(parts)
    assert batch.tolist() == [0, 0, 1, 2, 3]
    assert x[:, 0].tolist() == [1, 1, 1, 2, 2]
    assert pos.shape == (5, 3)


@pytest.mark.parametrize("build", [dense, tree])
def test_targets_are_not_needed(build: Callable[[], nn.Module]) -> None:
    images, targets = samples(64)
    parts = list(zip(images.split(16), targets.split(16), strict=True))
    results = []
    for batches in (parts, [inputs for inputs, _ in parts], [(inputs,) for inputs, _ in parts]):
        net = build()
        reestimate_batchnorm(net, batches)
        results.append(state(net))
    for other in results[1:]:
        same(results[0], other)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        result: Tensor = self.norm(first + second)
        return result


def test_two_inputs_are_told_from_inputs_and_targets() -> None:
    first, second, targets = torch.randn(6, 3), torch.randn(6, 3), torch.zeros(6, dtype=torch.long)
    for batch in ((first, second), ((first, second), targets)):
        net = Sum()
        reestimate_batchnorm(net, [batch], example_inputs=(first[:2], second[:2]))
        torch.testing.assert_close(net.norm.running_mean, (first + second).mean(0))


def test_samples_of_a_batch_are_counted() -> None:
    from torch_geometric.data import Batch, Data

    clouds = Batch.from_data_list([Data(pos=torch.randn(5, 3)), Data(pos=torch.randn(7, 3))])
    for inputs in (torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(9)), {"x": torch.zeros(2)}, clouds):
        assert sample_count(inputs) == 2
    assert sample_count((None, torch.zeros(4, 3))) == 4


def test_no_usable_batch() -> None:
    images, targets = samples(2)
    for batches in ([], [(images[:1], targets[:1])]):
        for given in (batches, [inputs for inputs, _ in batches]):
            with pytest.raises(TrainingError, match="at least one batch of two samples"):
                reestimate_batchnorm(dense(), given)
