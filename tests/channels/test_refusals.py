"""Layers that cannot be cut stay whole with a reason, and wrong arguments are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, load, save
from sigmab_plugin.errors import ConfigError, ModelError
from sigmab_plugin.tree.prepare import prepare

CONFIG = SigmaBConfig(levels=("b", "c"), head="d", projection_dim=4)


class Small(nn.Module):
    """Backbone, two levels and a linear classifier on images."""

    def __init__(self, level: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 2, 1)
        self.b = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU())
        self.c = nn.Sequential(
            nn.Conv2d(12, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 14, 1), nn.ReLU(), nn.Conv2d(14, 10, 1)
        )
        if level is not None:
            self.c = nn.Sequential(level())
        self.d = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))).mean((2, 3)))


def _images(count: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, 12, 12, generator=generator) for _ in range(2)]


def _groups(model: nn.Module, example: Any, **options: Any) -> dict[str, str]:
    prepared = prepare(model, example, config=CONFIG, **options)
    return {group.name: group.complete for group in prepared.groups if group.owner >= 0}


def _build(model: nn.Module, data: list[Tensor], config: SigmaBConfig = CONFIG, **options: Any) -> SigmaBNet:
    torch.manual_seed(0)
    return SigmaBPruner(model, data[0], calibration_data=data, config=config, **options).step().eval()


def _masked(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


COMPUTED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "mask": _masked,
}
computed = pytest.mark.parametrize("wrap", COMPUTED.values(), ids=COMPUTED)


def _with_classifier(wrap: Callable[[nn.Module], nn.Module]) -> Small:
    torch.manual_seed(0)
    model = Small()
    model.d = wrap(model.d)  # type: ignore[assignment]
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@computed
def test_a_computed_weight_keeps_its_group_and_no_other(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = Small()
    model.c[4] = wrap(model.c[4])
    names = [name for name, _ in model.named_parameters()]
    groups = _groups(model.eval(), _images()[0])
    assert groups["b.0"] == groups["c.0"] == ""
    assert "c.4: its weight is computed from others" in groups["c.2"]
    assert "remove_parametrizations, remove_weight_norm, prune.remove" in groups["c.4"]
    assert [name for name, _ in model.named_parameters()] == names
    model.c[0] = wrap(model.c[0])
    with pytest.raises(ModelError, match=r"level 'b' has no channels.*b\.0: c\.0: its weight is computed"):
        _groups(model, _images()[0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@computed
def test_a_computed_classifier_works_throughout(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model, data = _with_classifier(wrap), _images()
    full = CONFIG.replace(
        widths={"b": {"b.0": 12}, "c": {"c.0": 16, "c.2": 14}}, shared_ratio=1.0, repair="none"
    )
    net = _build(model, data, full)
    with torch.no_grad():
        leaves, _ = net.forward_leaves(data[1])
        assert torch.allclose(leaves, model(data[1]).unsqueeze(1).expand_as(leaves), atol=1e-6)
    net = _build(model, data)
    save(net, tmp_path)
    # Old weight norm leaves a weight with a gradient's graph in a fresh model.
    again = load(tmp_path, _with_classifier(wrap)).eval()
    with torch.no_grad():
        assert torch.equal(again(data[1]), net(data[1]))


class LastState(nn.Module):
    """A recurrent classifier that reads the last state, not the outputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.layer(x)
        return self.linear((state[0] if isinstance(state, tuple) else state)[-1])


class Packed(LastState):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        rows, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.linear(rows.mean(1))


class BesideLinear(nn.Module):
    """Both directions of a recurrent layer in front of other features: the width decides where those begin."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.beside, self.linear = layer, nn.Linear(16, 6), nn.Linear(38, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([self.layer(x)[0], self.beside(x).relu()], dim=-1).mean(1))


class Cell(LastState):
    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.layer(step, state)
        return self.linear(state[0] if isinstance(state, tuple) else state)


HEADS = {
    **{
        f"{k.__name__}, last state": lambda k=k: LastState(k(16, 16, batch_first=True))
        for k in (nn.LSTM, nn.GRU)
    },
    "RNN, last state": lambda: LastState(nn.RNN(16, 16, batch_first=True)),
    "GRU, packed": lambda: Packed(nn.GRU(16, 16, batch_first=True)),
    "LSTM, packed": lambda: Packed(nn.LSTM(16, 16, batch_first=True)),
    "GRU beside linear": lambda: BesideLinear(nn.GRU(16, 16, batch_first=True, bidirectional=True)),
    "GRUCell": lambda: Cell(nn.GRUCell(16, 16)),
    "LSTMCell": lambda: Cell(nn.LSTMCell(16, 16)),
}


class Sequences(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.b = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.c = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.d = head

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_a_recurrent_layer_reads_is_kept(head: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, data = Sequences(head()).eval(), [torch.randn(12, 5, 6) for _ in range(2)]
    groups = _groups(model, data[0])
    assert groups["b.0"] == groups["c.0"] == ""
    assert groups["c.2"] == "d.layer is recurrent"
    if isinstance(model.d, BesideLinear):
        # Torch-Pruning 1.3 takes everything that is concatenated for one group.
        assert groups["d.beside"] in ("", "d.layer is recurrent")
    assert torch.isfinite(_build(model, data)(data[0])).all()


def test_a_level_that_a_recurrent_layer_reads_is_refused_with_the_reason() -> None:
    class First(nn.GRU):
        def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
            rows: Tensor = super().forward(x, hx)[0]
            return rows

    model = Sequences(nn.Sequential(nn.AdaptiveAvgPool2d((1, 16)), nn.Flatten(), nn.Linear(16, 3)))
    model.c = nn.Sequential(nn.Linear(16, 24), First(24, 16, batch_first=True))
    with pytest.raises(ModelError, match=r"level 'c' has no channels.*c\.1 is recurrent"):
        _groups(model.eval(), torch.randn(4, 5, 6))


def test_groups_that_torch_pruning_cannot_list_are_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(tp.DependencyGraph, "get_pruning_group", fail)
    with pytest.raises(ModelError, match=r"cannot trace the levels.*list index out of range"):
        _groups(Small().eval(), _images()[0])


class Nested(Small):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"b": self.b, "c": self.c})
        del self.b, self.c

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.body["c"](self.body["b"](self.a(x))).mean((2, 3)))


def test_an_ignored_container_ignores_what_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    model, config = Nested().eval(), CONFIG.replace(levels=("body.b", "body.c"))
    with pytest.raises(ModelError, match=r"body\.b\.0 is an ignored layer"):
        prepare(model, _images()[0], config=config, ignored_layers=[model.body])
    with caplog.at_level(logging.INFO, logger="sigmab_plugin.channels.torch_pruning"):
        prepared = prepare(model, _images()[0], config=config, ignored_layers=[model.a, model.body["c"][0]])
    reasons = {group.name: group.complete for group in prepared.groups}
    assert reasons["body.c.0"] == "body.c.0 is an ignored layer"
    assert reasons["body.b.0"] == reasons["body.c.4"] == ""
    assert [r.message for r in caplog.records if "Conv2d lie outside the levels" in r.message]


@pytest.mark.parametrize("ignored", [["c.0"], "c.0", [torch.zeros(2)]], ids=["names", "name", "tensor"])
def test_what_cannot_be_ignored_is_refused(ignored: Any) -> None:
    with pytest.raises(ConfigError, match="ignored_layers takes modules and parameters"):
        _groups(Small().eval(), _images()[0], ignored_layers=ignored)


@pytest.mark.parametrize(
    "score", [torch.rand(3), torch.rand(2, 10), [1.0] * 10], ids=["short", "2-d", "list"]
)
def test_scores_of_another_shape_are_refused(score: Any) -> None:
    with pytest.raises(ConfigError, match=r"for the 10 channels of 'c\.4'") as caught:
        _groups(Small().eval(), _images()[0], importance=lambda group: score)
    assert (str(tuple(score.shape)) if torch.is_tensor(score) else "list") in str(caught.value)


def test_an_importance_that_fails_is_named_with_the_group() -> None:
    model, data = Small().eval(), _images()
    with pytest.raises(ConfigError, match=r"TaylorImportance fails on the channels of '\w\.\d'") as caught:
        _groups(model, data[0], importance=tp.importance.TaylorImportance())
    assert isinstance(caught.value.__cause__, AttributeError)
    model(data[0]).square().mean().backward()
    assert _groups(model, data[0], importance=tp.importance.TaylorImportance())["c.0"] == ""


class Windows(nn.Module):
    """Inner planes of quarters of the image, which are folded into the batch."""

    def __init__(self, samples_first: bool) -> None:
        super().__init__()
        self.samples_first = samples_first
        self.wide, self.narrow = nn.Conv2d(12, 16, 1), nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, halves = len(x), (2, 3)
        x = torch.stack(
            [half for part in x.chunk(2, 2) for half in part.chunk(2, 3)], int(self.samples_first)
        )
        x = self.narrow(self.wide(x.flatten(0, 1)).relu()).mean(halves, keepdim=True)
        return x.unflatten(0, (size, 4) if self.samples_first else (4, size)).mean(int(self.samples_first))


def test_inner_planes_of_folded_windows_are_means_over_a_samples_windows() -> None:
    torch.manual_seed(0)
    model, data = Small(lambda: Windows(True)).eval(), _images()
    pruner = SigmaBPruner(
        model, data[0], calibration_data=data, config=CONFIG.replace(inner_selection="activation")
    )
    assert torch.isfinite(pruner.step().eval()(data[0])).all()

    from sigmab_plugin.tree.inner import InnerActivations

    prepared = pruner.prepared
    level = prepared.segments.levels[1]
    planes = [group for group in prepared.owned(1) if group.name == "c.0.wide"]
    with torch.no_grad(), InnerActivations(level, 1, planes) as inner:
        frontier = model.b(model.a(data[0]))
        level(frontier)
        rows = inner.rows(frontier, prepared.modalities[1])
        expected = model.c[0].wide(frontier).relu().mean((2, 3))
    assert torch.allclose(rows, expected, atol=1e-6)


def test_windows_in_another_order_are_refused() -> None:
    torch.manual_seed(0)
    config = CONFIG.replace(inner_selection="activation")
    with pytest.raises(
        ModelError, match=r"'c\.0\.wide' is given 48 rows for 12 samples.*inner_selection='norm'"
    ):
        _build(Small(lambda: Windows(False)).eval(), _images(), config)
