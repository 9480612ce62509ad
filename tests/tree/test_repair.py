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
from sigmab_plugin.tree.repair import Pair, fit_layers
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
        (nn.Conv1d(3, 16, 3), nn.Conv1d(16, 5, 3, stride=2, padding=1), (3, 20)),
    ],
    ids=["linear", "linear on tokens", "conv2d", "strided and dilated", "conv1d"],
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


def test_layers_that_cannot_be_fitted_are_named_and_left(caplog: pytest.LogCaptureFixture) -> None:
    dense = Twice()
    own = copy.deepcopy(dense)
    own.layer = _narrow(dense.layer, outputs=torch.arange(4), inputs=torch.arange(4))
    before = own.layer.weight.clone()
    x = torch.randn(30, 8)
    with caplog.at_level(logging.INFO, "sigmab_plugin"):
        fit_layers(dense, own, {"layer.weight": {0: torch.arange(4), 1: torch.arange(4)}}, Pair(x, x[:, :4]))
    assert "not repaired" in caplog.text
    assert "layer" in caplog.text
    assert torch.equal(own.layer.weight, before)


def test_samples_are_spread_over_the_data_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "mlp")
    seen: list[int] = []

    def counting(dense: nn.Module, own: nn.Module, slices: Any, pair: Pair) -> Pair:
        seen.append(len(pair.dense))
        return fit_layers(dense, own, slices, pair)

    monkeypatch.setattr("sigmab_plugin.tree.build.fit_layers", counting)
    _built(case, repair="least_squares", repair_samples=50)
    # 192 samples: every fourth. Each level and the heads see all of them once.
    assert sum(seen) == 3 * 48


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
