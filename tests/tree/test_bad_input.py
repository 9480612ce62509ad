"""What cannot be used is refused with the reason and the next step, and the model is left alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, load, save
from sigmab_plugin.channels.slicing import named_tensors
from sigmab_plugin.errors import CalibrationError, ConfigError, FormatError, ModelError
from sigmab_plugin.tree import io as tree_io

from ..zoo import CASES, MLP, Case, ResNet18

MLP_CASE = next(case for case in CASES if case.name == "mlp")


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Watch a model: at the end its weights, modes, flags and hooks must be the ones it came with."""
    watched: list[tuple[nn.Module, nn.Module]] = []

    def watch(model: nn.Module) -> nn.Module:
        watched.append((model, copy.deepcopy(model)))
        return model

    yield watch
    for model, before in watched:
        assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
        assert [len(m._forward_hooks) for m in model.modules()] == [
            len(m._forward_hooks) for m in before.modules()
        ]
        for (name, now), (_, old) in zip(
            named_tensors(model).items(), named_tensors(before).items(), strict=True
        ):
            if not isinstance(now, nn.parameter.UninitializedParameter):
                assert torch.equal(now, old), name
            assert now.requires_grad == old.requires_grad


def _restructure(model: nn.Module, data: Any = None, **options: Any) -> SigmaBNet:
    torch.manual_seed(1)
    batches = [torch.randn(12, 10) * torch.linspace(0.1, 3, 10) for _ in range(3)]
    arguments: dict[str, Any] = {"levels": ["b", "c"], "head": "d", "projection_dim": 8, **options}
    calibration = batches if data is None else data
    return SigmaBPruner(model, batches[0], calibration_data=calibration, **arguments).step()


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(10, 10) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.d(self.c(self.b(y)) + y)


class Twice(Skip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.b(self.a(x)))))


class Branching(Skip):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.d(self.c(self.b(y))) if y.sum() > 0 else self.d(self.c(self.b(-y)))


class Lazy(Skip):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LazyLinear(10)  # type: ignore[assignment]


class Tied(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
        self.c[0].weight = self.b[2].weight
        self.d = nn.Linear(24, 5)


class Wrapped(nn.Module):
    """As data-parallel training and torch.compile wrap a model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Add(nn.Linear):
    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + bias


class Broadcast(Skip):
    def __init__(self) -> None:
        super().__init__()
        self.b = Add(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x), x.mean(0, keepdim=True))))


class TiedInside(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
        self.c[2].weight = self.c[0].weight
        self.d = nn.Linear(24, 5)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (MLP, {"levels": ["bb", "c"]}, ConfigError, "no module 'bb'; did you mean"),
        (MLP, {"levels": ["zzz"]}, ConfigError, "top-level modules: a, b, c, d"),
        (MLP, {"levels": []}, ConfigError, "levels is empty"),
        (MLP, {"head": ""}, ConfigError, "head is missing"),
        (MLP, {"levels": ["c", "b"]}, ConfigError, "order of execution: b, c, d"),
        (MLP, {"levels": ["b", "d"], "head": "c"}, ConfigError, "order of execution: b, c, d"),
        (MLP, {"levels": ["b", "b.2"]}, ConfigError, "lies inside 'b'"),
        (MLP, {"levels": ["b", "b"]}, ConfigError, "twice"),
        (Skip, {}, ModelError, r"'c' is no single frontier: the output of 'a' also crosses the cut"),
        (Twice, {}, ConfigError, "'b' is called 2 times"),
        (Branching, {}, ModelError, r"cannot be traced .*test_bad_input.py: return .* if y\.sum\(\) > 0"),
        (Broadcast, {}, ModelError, r"value 1 .* shape \(1, 10\) beside features of shape \(12, 10\)"),
        (Lazy, {}, ModelError, "not initialised yet"),
        (Tied, {}, ModelError, "is tied to .* across a cut"),
        (TiedInside, {}, ModelError, "'c.0.weight' is tied to 'c.2.weight', .* Untie"),
        (MLP, {"widths": {"b": 25}}, ConfigError, "25 channels asked of 'b.2', which has 24"),
        (MLP, {"widths": {"q": 3}}, ConfigError, "neither a level"),
        (MLP, {"widths": {"b": {"a.0": 3}}}, ConfigError, "no group of channels belongs to a layer 'a.0'"),
        (MLP, {"widths": {"b": 4}, "active_ratio": 0.5}, ConfigError, "not both"),
        (MLP, {"active_ratio": 0.01}, ConfigError, "between .* lower projection_dim"),
        (MLP, {"levels": [nn.Linear(3, 3)]}, ConfigError, "levels holds modules: give their qualified names"),
        (MLP().state_dict, {}, ModelError, "is a OrderedDict and must be a torch.nn.Module"),
        (Wrapped, {}, ConfigError, "did you mean inner.b?"),
        (MLP, {"shared_ratio": 1.5}, ConfigError, "at most 1"),
        (MLP, {"importance": lambda group: None}, ConfigError, "gives no score"),
    ],
)
def test_model_and_options(
    untouched: Callable[[nn.Module], nn.Module],
    make: Callable[[], nn.Module],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    torch.manual_seed(0)
    model = make()
    with pytest.raises(error, match=message):
        _restructure(untouched(model) if isinstance(model, nn.Module) else model, **options)


def test_an_example_that_does_not_fit_is_a_public_error() -> None:
    with pytest.raises(ModelError, match="does not run on example_inputs") as caught:
        SigmaBPruner(MLP(), torch.randn(2, 11), calibration_data=[], levels=["b", "c"], head="d")
    assert type(caught.value) is ModelError


def test_a_path_that_saves_little_and_few_samples_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    _restructure(MLP())
    assert not caplog.records
    _restructure(MLP(), [torch.randn(20, 10)], projection_dim=128)
    assert "of the dense network's parameters" in caplog.text
    assert "calibration samples: give some hundred for every leaf" in caplog.text


def _one_shot() -> Iterator[torch.Tensor]:
    yield torch.randn(4, 10)


NAN = torch.full((4, 10), float("nan"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        (_one_shot(), "one-shot"),
        ([torch.randn(1, 10)], "at least 2"),
        ([torch.ones(8, 10)], "same latent direction"),
        ([torch.randn(4, 10), NAN], "batch 1 holds NaN"),
        ([torch.randn(4, 11)], "dimension 1 differs"),
        ([torch.randn(4, 10).double()], "a float64 tensor.*example_inputs a float32 tensor.*convert"),
        ([torch.randn(4, 10, 2)], r"float32 tensor of shape \(4, 10, 2\); expected"),
        ([(torch.randn(8, 10), torch.zeros(8, dtype=torch.long))], "all calibration samples have target 0"),
        ([torch.empty(4, 10, device="meta")], "on meta"),
        ([{"x": torch.randn(4, 10)}], "is dict; expected"),
    ],
)
def test_calibration_data(untouched: Callable[[nn.Module], nn.Module], data: Any, message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CalibrationError, match=message):
        _restructure(untouched(MLP()), data)


def test_missing_calibration_data(untouched: Callable[[nn.Module], nn.Module]) -> None:
    model = untouched(MLP())
    pruner = SigmaBPruner(model, torch.randn(2, 10), levels=["b"], head="d")
    with pytest.raises(CalibrationError, match="calibration_data is missing"):
        pruner.step()


def test_training_mode_and_dropout_come_back(untouched: Callable[[nn.Module], nn.Module]) -> None:
    case: Case = next(c for c in CASES if c.name == "vgg")
    model = untouched(case.model().train())
    net = SigmaBPruner(model, case.batches()[0], config=case.config, calibration_data=case.batches()).step()
    again = SigmaBPruner(model, case.batches()[0], config=case.config, calibration_data=case.batches()).step()
    # Dropout was off while calibrating: two runs agree.
    assert again.plan == net.plan


def test_frozen_parameters_stay_frozen(untouched: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = MLP()
    for parameter in model.b.parameters():
        parameter.requires_grad_(False)
    untouched(model)
    net = _restructure(model)
    assert not any(p.requires_grad for p in net.specializers["0"].parameters())
    assert all(p.requires_grad for p in net.specializers["0_0"].parameters())


def test_calibration_data_is_read_once_per_level() -> None:
    class Counting:
        passes = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.passes += 1
            torch.manual_seed(5)
            return iter([torch.randn(12, 10) * torch.linspace(0.1, 3, 10) for _ in range(3)])

    data = Counting()
    torch.manual_seed(0)
    _restructure(MLP(), data)
    assert data.passes <= 2 + 1  # one of them may be the check for one-shot iterators


# Saved files ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, SigmaBNet]:
    torch.manual_seed(0)
    net = _restructure(MLP())
    save(net, tmp_path)
    return tmp_path, net


def _alter_plan(directory: Path, **changes: Any) -> None:
    record = json.loads((directory / "plan.json").read_text())
    record.update(changes)
    (directory / "plan.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "plan.json").unlink(), "no plan.json"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "plan.json").write_text((d / "plan.json").read_text()[:500]), "truncated"),
        (lambda d: (d / "plan.json").write_bytes(b"\xff\xfe\x00"), "truncated or altered"),
        (lambda d: (d / "plan.json").write_text("[]"), "no plan"),
        (lambda d: _alter_plan(d, modalities=["images"] * 3), "checksum does not match"),
        (lambda d: _alter_plan(d, version=99), "version 99.*upgrade"),
        (lambda d: _alter_plan(d, format="other"), "not a SigmaB plan"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-7]),
            "truncated or altered",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(
                bytes([*(d / "model.safetensors").read_bytes()[:-1], 1])
            ),
            "truncated or altered",
        ),
    ],
)
def test_damaged_files(saved: tuple[Path, SigmaBNet], damage: Callable[[Path], Any], message: str) -> None:
    directory, _ = saved
    damage(directory)
    with pytest.raises(FormatError, match=message):
        load(directory, MLP())


def test_another_dense_model(saved: tuple[Path, SigmaBNet]) -> None:
    directory, _ = saved
    wider = MLP()
    wider.b[2] = nn.Linear(24, 30)
    wider.c[0] = nn.Linear(30, 32)
    with pytest.raises(ModelError, match=r"'b\.2\.weight' has shape \(30, 24\).*expects \(24, 24\)"):
        load(directory, wider)
    with pytest.raises(ConfigError, match="no module 'b'"):
        load(directory, ResNet18())
    no_bias = MLP()
    no_bias.c[0] = nn.Linear(24, 32, bias=False)
    with pytest.raises(ModelError, match=r"no tensor 'c\.0\.bias'"):
        load(directory, no_bias)


def test_load_with_its_arguments_swapped(saved: tuple[Path, SigmaBNet]) -> None:
    with pytest.raises(ModelError, match="the folder first"):
        load(MLP(), saved[0])  # type: ignore[arg-type]


def test_load_on_the_meta_device(saved: tuple[Path, SigmaBNet]) -> None:
    directory, net = saved
    with torch.device("meta"):
        dense = MLP()
    x = torch.randn(7, 10)
    assert torch.equal(load(directory, dense)(x), net.eval()(x))


def test_full_disk_keeps_the_old_file(saved: tuple[Path, SigmaBNet], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, net = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    torch.manual_seed(9)
    other = _restructure(MLP())

    for failing in (1, 2):
        calls = []

        def write(path: Path, data: bytes, failing: int = failing, calls: list[Path] = calls) -> None:
            calls.append(path)
            path.write_bytes(data[:10] if len(calls) == failing else data)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(tree_io, "_write", write)
        with pytest.raises(OSError, match="No space left"):
            save(other, directory)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    x = torch.randn(7, 10)
    assert torch.equal(load(directory, MLP())(x), net.eval()(x))


@pytest.mark.parametrize("survives", [0, 1])
def test_kill_during_save_leaves_one_whole_net(
    saved: tuple[Path, SigmaBNet], monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    directory, old = saved
    torch.manual_seed(9)
    new = _restructure(MLP())
    real = tree_io.os.replace
    done = []

    def replace(source: Any, target: Any) -> None:
        if len(done) == survives:
            raise KeyboardInterrupt
        done.append(target)
        real(source, target)

    monkeypatch.setattr(tree_io.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(new, directory)
    monkeypatch.undo()
    x = torch.randn(7, 10)
    expected = new if survives else old
    assert torch.equal(load(directory, MLP())(x), expected.eval()(x))
    # And the next save cleans up.
    save(new, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["model.safetensors", "plan.json"]
    assert torch.equal(load(directory, MLP())(x), new.eval()(x))


def test_config_sections() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'shared_ration'\. Did you mean 'shared_ratio'"):
        SigmaBConfig.from_dict({"algorithm": "sigmab", "shared_ration": 0.5})
    with pytest.raises(ConfigError, match="levels has the wrong type"):
        SigmaBConfig.from_dict({"algorithm": "sigmab", "levels": "layer3"})
    with pytest.raises(ConfigError, match="for algorithm 'quantization'"):
        SigmaBConfig.from_dict({"algorithm": "quantization"})
    with pytest.raises(ConfigError, match="unknown preset"):
        SigmaBConfig.preset("resnet51")
    config = SigmaBConfig.preset("pointnet2", seed=4)
    assert SigmaBConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
