"""Slicing by plain index sets against Torch-Pruning's own in-place pruning, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from torch import nn

from sigmab_plugin.channels import ChannelGroup, slice_module, slices_of
from sigmab_plugin.channels.groups import Member
from sigmab_plugin.channels.slicing import named_tensors
from sigmab_plugin.tree.allocation import top_channels
from sigmab_plugin.tree.prepare import prepare
from sigmab_plugin.tree.segments import call

from ..zoo import CASES, Case

ORACLE = [case for case in CASES if case.name not in ("pointnet2", "unequal-branches", "mlp-one-level")]


def _keep(group: ChannelGroup) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(group.name))
    width = max(group.partitions, group.size // 2 // group.partitions * group.partitions)
    return top_channels(torch.rand(group.size, generator=generator), width, group.partitions)


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: case.name)
def test_half_of_every_group(case: Case) -> None:
    model = case.model()
    inputs = case.batches(1)[0]
    prepared = prepare(model, inputs, config=case.config)
    groups = [g for g in prepared.groups if g.prunable]
    keep = {g.name: _keep(g) for g in groups}
    ours = [prepared.segments.backbone, *(prepared.sliced(i, keep)[0] for i in range(prepared.depth + 1))]

    theirs = copy.deepcopy(model)
    for group in groups:
        graph = tp.DependencyGraph().build_dependency(theirs, (inputs,), ignored_params=[], verbose=False)
        layer = theirs.get_submodule(group.name)
        drop = sorted(set(range(group.size)) - set(keep[group.name].tolist()))
        pruner = graph.get_pruner_of_module(layer)
        graph.get_pruning_group(layer, pruner.prune_out_channels, drop).prune()

    expected = named_tensors(theirs)
    with torch.no_grad():
        value = call(ours[0], inputs)
        for piece in ours[1:]:
            for name, tensor in named_tensors(piece).items():
                assert torch.equal(tensor, expected[name]), name
            value = call(piece, value)
        assert torch.equal(value, theirs.eval()(inputs))
    for piece in ours[1:]:
        for name, module in piece.named_modules():
            # Attributes, not only tensors: what the layer prints and computes with.
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                assert repr(module) == repr(theirs.get_submodule(name)), name


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: case.name)
def test_keeping_everything_changes_no_bit(case: Case) -> None:
    model = case.model()
    inputs = case.batches(1)[0]
    prepared = prepare(model, inputs, config=case.config)
    keep = {g.name: torch.arange(g.size) for g in prepared.groups}
    with torch.no_grad():
        value = call(prepared.segments.backbone, inputs)
        for number in range(prepared.depth + 1):
            value = call(prepared.sliced(number, keep)[0], value)
        assert torch.equal(value, call(model, inputs))


def test_hand_made_slice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    kept = [0, 3]
    group = ChannelGroup(
        name="0",
        size=4,
        owner=0,
        members=(
            Member(0, "0.weight", 0, "out"),
            Member(0, "0.bias", 0, "out"),
            *(Member(0, f"1.{n}", 0, "out") for n in ("weight", "bias", "running_mean", "running_var")),
            Member(0, "3.weight", 1, "in", tuple(range(16)), tuple(c for c in range(4) for _ in range(4))),
        ),
    )
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
    sliced = slice_module(model, slices_of([group], {"0": torch.tensor(kept)}, segment=0, shapes=shapes))
    assert torch.equal(sliced[0].weight, model[0].weight[kept])
    assert torch.equal(sliced[1].running_var, model[1].running_var[kept])
    assert torch.equal(sliced[3].weight, model[3].weight[:, [0, 1, 2, 3, 12, 13, 14, 15]])
    assert (sliced[0].out_channels, sliced[1].num_features, sliced[3].in_features) == (2, 2, 8)
    x = torch.randn(2, 3, 2, 2)
    masked = copy.deepcopy(model).eval()
    with torch.no_grad():
        masked[1].weight[[1, 2]] = 0
        masked[1].bias[[1, 2]] = 0
        assert torch.allclose(sliced.eval()(x), masked(x), atol=1e-6)


def test_slicing_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 6)
    sliced = slice_module(model, {"weight": {0: torch.tensor([1, 2])}, "bias": {0: torch.tensor([1, 2])}})
    assert sliced.weight.shape == (2, 4)
    assert sliced.out_features == 2


def test_frozen_parameters_stay_frozen_and_do_not_hide_channels() -> None:
    case = CASES[1]
    model = case.model()
    for parameter in model.layer3.parameters():
        parameter.requires_grad_(False)
    inputs = case.batches(1)[0]
    prepared = prepare(model, inputs, config=case.config)
    assert len(prepared.owned(1)) == len(prepare(case.model(), inputs, config=case.config).owned(1))
    group = prepared.owned(1)[0]
    sliced, _ = prepared.sliced(1, {group.name: torch.arange(3)})
    assert not any(p.requires_grad for p in sliced.parameters())


class Scaled(nn.Module):
    """A linear layer in a coat of its own, known to nobody."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(inputs, outputs))
        self.gain = nn.Parameter(torch.ones(outputs))
        self.size = (inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.size == tuple(self.table.shape)
        return torch.relu(x @ self.table * self.gain)


class ScaledPruner(
    tp.pruner.function.BasePruningFunc if hasattr(tp.pruner, "function") else tp.BasePruningFunc
):
    def prune_out_channels(self, layer: Scaled, idxs: list[int]) -> nn.Module:
        keep = [i for i in range(layer.size[1]) if i not in set(idxs)]
        layer.table = self._prune_parameter_and_grad(layer.table, keep, 1)
        layer.gain = self._prune_parameter_and_grad(layer.gain, keep, 0)
        layer.size = (layer.size[0], len(keep))
        return layer

    def prune_in_channels(self, layer: Scaled, idxs: list[int]) -> nn.Module:
        keep = [i for i in range(layer.size[0]) if i not in set(idxs)]
        layer.table = self._prune_parameter_and_grad(layer.table, keep, 0)
        layer.size = (len(keep), layer.size[1])
        return layer

    def get_out_channels(self, layer: Scaled) -> int:
        return layer.size[1]

    def get_in_channels(self, layer: Scaled) -> int:
        return layer.size[0]


def test_customised_pruner_is_probed(tmp_path: Path) -> None:
    from sigmab_plugin import SigmaBPruner, load, save
    from sigmab_plugin.config import SigmaBConfig

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Scaled(8, 12), Scaled(12, 20), nn.Linear(20, 3)).eval()
    data = [torch.randn(16, 6) for _ in range(3)]
    config = SigmaBConfig(levels=("1", "2"), head="3", projection_dim=8)
    pruner = SigmaBPruner(
        model, data[0], config=config, calibration_data=data, customized_pruners={Scaled: ScaledPruner()}
    )
    names = {g.name: g.size for g in pruner.prepared.groups if g.prunable}
    assert names == {"1": 12, "2": 20}
    net = pruner.step()
    assert net.specializers["0_1"].get_submodule("2").size == (8, 10)
    out = net.eval()(data[0])
    assert out.shape == (16, 3)
    save(net, tmp_path)
    assert torch.equal(load(tmp_path, model)(data[0]), out)


def test_probe_agrees_with_the_layouts() -> None:
    from sigmab_plugin.channels.layouts import layout_of
    from sigmab_plugin.channels.probe import _probe

    graph = tp.DependencyGraph().build_dependency(nn.Linear(2, 2), (torch.randn(1, 2),), verbose=False)
    layers = [
        nn.Conv2d(5, 7, 3),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Linear(5, 9),
        nn.BatchNorm1d(6),
        nn.LayerNorm(10),
        nn.GroupNorm(2, 6),
        nn.PReLU(5),
        nn.Embedding(4, 6),
        nn.ConvTranspose2d(5, 7, 2),
        nn.MultiheadAttention(8, 2),
    ]
    for layer in layers:
        pruner = graph.get_pruner_of_module(layer)
        for role in ("out", "in"):
            total = getattr(pruner, f"get_{role}_channels")(layer)
            found = {(t, d): dict(zip(p, c, strict=True)) for t, d, p, c in _probe(layer, pruner, role)}
            layout = layout_of(layer)
            assert layout is not None
            known = {
                (t, d): dict(zip(p, c, strict=True))
                for t, d, p, c in layout.places(layer, role, range(total))
            }
            assert found == known, (layer, role)
