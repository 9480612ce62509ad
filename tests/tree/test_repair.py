"""Least-squares repair: sliced layers come near the dense ones, and nothing else changes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, load, save, static_twin
from sigmab_plugin.tree.modality import Images
from sigmab_plugin.tree.repair import Pair, fit_layers, regress
from sigmab_plugin.tree.segments import call

from ..zoo import CASES, MLP, Case

SIZE = 48


def _built(case: Case, **changes: Any) -> tuple[nn.Module, list[Any], SigmaBNet]:
    model, batches = case.model(), case.batches(4, SIZE)
    config = case.config.replace(**changes)
    pruner = SigmaBPruner(model, batches[0], config=config, calibration_data=batches, **case.options)
    return model, batches, pruner.step()


def _distance(net: nn.Module, model: nn.Module, batches: list[Any]) -> float:
    """Mean squared difference of logits, as a share of the dense logits' variance."""
    with torch.no_grad():
        found = torch.cat([call(net.eval(), batch) for batch in batches])
        wanted = torch.cat([call(model.eval(), batch) for batch in batches])
    return float((found - wanted).square().mean() / wanted.var(dim=0).mean())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_tree_comes_nearer_to_the_dense_network(case: Case) -> None:
    model, batches, copied = _built(case)
    before = copy.deepcopy(model.state_dict())
    _, _, repaired = _built(case, repair="least_squares")
    assert repaired.parameter_counts() == copied.parameter_counts()
    assert _distance(repaired, model, batches) < 0.1 * _distance(copied, model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *repaired.modules()))
    assert all(p.requires_grad for p in repaired.parameters())


@pytest.mark.parametrize("name", ["resnet50", "vit", "pointnet2", "mlp"])
def test_so_does_the_twin(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model, batches = case.model(), case.batches(4, SIZE)
    copied, repaired = (
        static_twin(model, batches[0], config=config, calibration_data=batches, **case.options)
        for config in (case.config, case.config.replace(repair="least_squares"))
    )
    assert _distance(repaired, model, batches) < 0.1 * _distance(copied, model, batches)


def test_the_first_level_and_the_backbone_are_chosen_as_before() -> None:
    case = next(case for case in CASES if case.name == "resnet18")
    _, _, copied = _built(case)
    _, _, repaired = _built(case, repair="least_squares")
    for path in ("0", "1"):
        assert repaired.plan.branches[path] == copied.plan.branches[path]
    for name, tensor in copied.backbone.state_dict().items():
        assert torch.equal(tensor, repaired.backbone.state_dict()[name])


class Doubled(nn.Module):
    """Every channel of ``wide`` is there twice, so that half of them tell all that ``reader`` has to know."""

    def __init__(self, reader: nn.Module, wide: nn.Module) -> None:
        super().__init__()
        self.wide, self.reader = wide, reader
        with torch.no_grad():
            for tensor in wide.parameters():
                half = len(tensor) // 2
                tensor[half:] = tensor[:half]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(torch.relu(self.wide(x)))


@pytest.mark.parametrize(
    ("wide", "reader", "shape"),
    [
        (nn.Linear(6, 16), nn.Linear(16, 5), (6,)),
        (nn.Linear(6, 16), nn.Linear(16, 5, bias=False), (7, 6)),
        (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3, padding=1, bias=False), (3, 9, 8)),
        (nn.Conv2d(3, 16, 1), nn.Conv2d(16, 5, (1, 3), stride=2, dilation=(1, 2)), (3, 9, 9)),
        (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, (3, 2), padding="same", dilation=2), (3, 9, 8)),
        (nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3, padding=(2, 1), padding_mode="reflect"), (3, 9, 8)),
        (nn.Conv1d(3, 16, 3), nn.Conv1d(16, 5, 3, stride=2, padding=1), (3, 20)),
    ],
    ids=["linear", "linear on tokens", "conv2d", "strided and dilated", "same", "reflect", "conv1d"],
)
def test_what_the_kept_channels_tell_is_recovered(
    wide: nn.Module, reader: nn.Module, shape: tuple[int, ...]
) -> None:
    dense = Doubled(reader, wide).eval()
    own = copy.deepcopy(dense)
    kept = torch.arange(8)
    own.wide = _narrow(wide, outputs=kept)
    own.reader = _narrow(reader, inputs=kept)
    slices = {"wide.weight": {0: kept}, "wide.bias": {0: kept}, "reader.weight": {1: kept}}
    x, fresh = torch.randn(300, *shape), torch.randn(20, *shape)
    with torch.no_grad():
        wanted = dense(fresh)
        assert not torch.allclose(own(fresh), wanted, atol=0.1)
        outputs = fit_layers(dense, own, slices, Pair(x, x))
        assert torch.allclose(own(fresh), wanted, atol=0.02)
        assert torch.equal(outputs.dense, dense(x))
        assert torch.allclose(outputs.own, own(x))
    assert torch.equal(own.wide.weight, wide.weight[kept])


def _narrow(
    layer: nn.Module, *, outputs: torch.Tensor | None = None, inputs: torch.Tensor | None = None
) -> nn.Module:
    result = copy.deepcopy(layer)
    weight = layer.weight if outputs is None else layer.weight[outputs]
    result.weight = nn.Parameter(weight if inputs is None else weight[:, inputs])
    if outputs is not None and layer.bias is not None:
        result.bias = nn.Parameter(layer.bias[outputs])
    for name, size in zip(("out", "in"), result.weight.shape, strict=False):
        for word in ("features", "channels"):
            if hasattr(result, f"{name}_{word}"):
                setattr(result, f"{name}_{word}", size)
    return result


class Twice(nn.Module):
    """One layer read at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


class Cosine(nn.Linear):
    """A Linear by class, and none by what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.normalize(x, dim=1), self.weight)


class Named(nn.Module):
    """A layer whose input is given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize(
    ("dense", "name"), [(Twice(), "layer"), (nn.Sequential(Cosine(8, 8)), "0"), (Named(), "layer")]
)
def test_layers_that_cannot_be_fitted_are_named_and_left(
    dense: nn.Module, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    half = torch.arange(4)
    own = copy.deepcopy(dense)
    setattr(own, name, _narrow(dense.get_submodule(name), outputs=half, inputs=half))
    before = own.get_submodule(name).weight.clone()
    x = torch.randn(30, 8)
    with caplog.at_level(logging.INFO, "sigmab_plugin"):
        fit_layers(dense, own, {f"{name}.weight": {0: half, 1: half}}, Pair(x, x[:, :4]))
    assert f"as copied: {name}" in caplog.text
    assert torch.equal(own.get_submodule(name).weight, before)


def test_few_rows_are_not_fitted_to_the_letter() -> None:
    """With about as many rows as inputs an unpulled fit is worse on other samples than what it replaces."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 128, generator=generator)
    weight = torch.randn(10, 128, generator=generator)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 64, generator=generator) @ mix + torch.randn(count, 128, generator=generator)
        return x[:, :64], x @ weight.T

    def error(fitted: torch.Tensor) -> float:
        x, y = rows(2000)
        return float((y - x @ fitted.float().T).square().mean() / y.var())

    copied = weight[:, :64]
    found = {count: regress(*rows(count), copied, bias=False) for count in (70, 2000)}
    assert error(found[70][0]) < 1.05 * error(copied)
    assert error(found[2000][0]) < 0.6 * error(copied)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_offsets_are_fitted_at_any_scale(scale: float) -> None:
    x = scale * torch.randn(400, 8)
    weight, offset = torch.randn(3, 8) / scale, torch.tensor([5.0, -2.0, 0.5])
    found = regress(x, x @ weight.T + offset, torch.zeros(3, 8), bias=True)
    assert torch.allclose(scale * found[0].float(), scale * weight, atol=0.02)
    assert torch.allclose(found[1].float(), offset, atol=0.02)


def test_values_that_tell_nothing() -> None:
    assert regress(torch.zeros(20, 4), torch.randn(20, 2), torch.ones(2, 4), bias=False) is None
    x = torch.randn(20, 4)
    x[3, 1] = torch.inf
    assert regress(x, torch.randn(20, 2), torch.ones(2, 4), bias=True) is None
    weight, _ = regress(torch.randn(3, 4), torch.randn(3, 2), torch.ones(2, 4), bias=True)
    assert torch.equal(weight, torch.ones(2, 4).double())


@pytest.mark.parametrize("size", [1, 5, 48])
def test_samples_are_drawn_from_all_the_data(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where batches are smaller than the distance between two of them, or the data has a rhythm."""
    case = next(case for case in CASES if case.name == "mlp")
    seen: list[Pair] = []

    def watched(dense: nn.Module, own: nn.Module, slices: Any, pair: Pair) -> Pair:
        seen.append(pair)
        return fit_layers(dense, own, slices, pair)

    monkeypatch.setattr("sigmab_plugin.tree.build.fit_layers", watched)
    model = case.model()
    batches = list(torch.cat(case.batches(4, SIZE)).split(size))
    config = case.config.replace(repair="least_squares", repair_samples=20)
    SigmaBPruner(model, batches[0], config=config, calibration_data=batches).step()
    # Two levels and the heads see each of them once, whatever the batches are.
    assert sum(len(pair.dense) for pair in seen) == 3 * 20
    with torch.no_grad():
        everything = model.a(torch.cat(batches))
    drawn = torch.cat([pair.dense for pair in seen[:2]])
    where = [int((everything - row).abs().sum(1).argmin()) for row in drawn]
    assert len(set(where)) == len(where)
    assert {index % 4 for index in where} == {0, 1, 2, 3}


def test_a_repaired_net_is_saved_and_loaded(tmp_path: Any) -> None:
    case = next(case for case in CASES if case.name == "mlp")
    _, batches, net = _built(case, repair="least_squares")
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", MLP())
    assert again.config.repair == "least_squares"
    assert torch.equal(again.eval()(batches[0]), net.eval()(batches[0]))


def test_frontiers_are_joined_in_order() -> None:
    x = torch.randn(6, 2, 3, 3)
    assert torch.equal(Images().join([x[:2], x[2:]]), x)
    pair = Images().join([(x[:1], "unchanged"), (x[1:], "unchanged")])
    assert torch.equal(pair[0], x)
    assert pair[1] == "unchanged"


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="repair"):
        SigmaBConfig(repair="gradient")
