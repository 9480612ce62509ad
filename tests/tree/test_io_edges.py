"""Saving and loading what weights alone do not hold, and input that is refused by name."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, load, save
from sigmab_plugin.counting import macs, storage_bytes
from sigmab_plugin.errors import CalibrationError, ConfigError, FormatError, ModelError
from sigmab_plugin.tree.io import unshared

DATA = [torch.randn(12, 10, generator=torch.Generator().manual_seed(n)) for n in range(3)]


class Net(nn.Module):
    def __init__(self, extra: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.a = nn.Linear(10, 16)
        self.b = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.c = nn.Sequential(nn.Linear(16, 24), extra(), nn.ReLU(), nn.Linear(24, 20))
        self.d = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def _pruner(model: nn.Module, **options: Any) -> SigmaBPruner:
    arguments: dict[str, Any] = {"levels": ["b", "c"], "head": "d", "calibration_data": DATA, **options}
    return SigmaBPruner(model, arguments.pop("example", DATA[0]), projection_dim=8, **arguments)


def _built(model: nn.Module) -> SigmaBNet:
    torch.manual_seed(0)
    return _pruner(model).step().eval()


def _same(one: SigmaBNet, other: SigmaBNet) -> bool:
    with torch.no_grad():
        return torch.equal(one(DATA[0]), other(DATA[0]))


# Buffers that are not persistent -----------------------------------------------------------------


class Ramp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ramp", torch.linspace(0, 1, 24), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ramp


def test_a_buffer_that_is_not_persistent_comes_from_the_dense_model(tmp_path: Path) -> None:
    net = _built(Net(Ramp))
    save(net, tmp_path)
    assert _same(load(tmp_path, Net(Ramp)), net)
    with torch.device("meta"):
        meta = Net(Ramp)
    with pytest.raises(FormatError, match=r"specializers\.0_0\.c\.1\.ramp.*not persistent.*on a real device"):
        load(tmp_path, meta)


# Extra state -------------------------------------------------------------------------------------


class Extra(nn.Module):
    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("state", [{"v": [1, 2.5, "x", None, True]}, None, torch.arange(3)], ids=str)
def test_extra_state_comes_back(tmp_path: Path, state: Any) -> None:
    net = _built(Net(lambda: Extra(state)))
    save(net, tmp_path)
    with torch.device("meta"):
        meta = Net(Extra)
    again = load(tmp_path, meta)
    assert _same(again, net)
    for key in ("0_0", "0_1", "1_0", "1_1"):
        found = again.specializers[key].get_submodule("c.1").state
        assert torch.equal(found, state) if torch.is_tensor(state) else found == state


@pytest.mark.parametrize("state", [(1, 2), {1: 2}, {"a": torch.zeros(2)}, {"a": float("nan")}, b"x"], ids=str)
def test_extra_state_that_needs_pickle_is_refused(tmp_path: Path, state: Any) -> None:
    save(_built(Net()), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    net = _built(Net(lambda: Extra(state)))
    with pytest.raises(ModelError, match=r"'specializers\.0_0\.c\.1'.*extra state \(\w+\).*get_extra_state"):
        save(net, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ModelError, match=r"specializers\.0_0\.c\.1\._extra_state.*only tensors"):
        unshared(net.state_dict())


# Ties --------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two layers with one weight and one mask, around a stream that keeps all its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = nn.Linear(16, 16), nn.Linear(16, 16)
        self.p.register_buffer("mask", torch.ones(16))
        self.q.register_buffer("mask", self.p.mask)
        self.q.weight = self.p.weight
        self.u, self.v = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.p(x) * self.p.mask
        x = x + self.q(x) * self.q.mask
        return x + self.v(torch.relu(self.u(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(10, 16), Residual(), Residual(), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    net = _built(Tied())
    save(net, tmp_path)
    again = load(tmp_path, Tied())
    assert _same(again, net)
    assert again.parameter_counts() == net.parameter_counts()
    assert storage_bytes(again) == storage_bytes(net)
    for key in net.specializers:
        (block,) = again.specializers[key].children()
        assert block.p.weight is block.q.weight
        assert block.p.mask is block.q.mask
        assert isinstance(block.q.weight, nn.Parameter)
    save(again, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_weights_untied_in_the_net_stay_untied(tmp_path: Path) -> None:
    net = _built(Tied())
    (block,) = net.specializers["0"].children()
    block.q.weight = nn.Parameter(block.q.weight.detach().clone())
    save(net, tmp_path)
    again = load(tmp_path, Tied())
    assert again.parameter_counts() == net.parameter_counts()
    (block,) = again.specializers["0"].children()
    assert block.p.weight is not block.q.weight


def test_a_file_without_ties_and_extra_states_is_read(tmp_path: Path) -> None:
    """As versions wrote it that knew neither."""
    net = _built(Tied())
    save(net, tmp_path)
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["weights"].pop("tied")
    assert set(record["weights"]) == {"file", "sha256"}
    del record["sha256"]
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    record["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "plan.json").write_text(json.dumps(record))
    assert _same(load(tmp_path, Tied()), net)


# Refused by name ---------------------------------------------------------------------------------


class Held(nn.Module):
    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 24)
        self.held = make(self.inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(lambda inner: threading.Lock(), "lock"), (lambda inner: [inner.weight * 1.0], "list")],
    ids=["lock", "tensors with a history"],
)
def test_an_attribute_that_cannot_be_copied(make: Callable[[nn.Module], Any], kind: str) -> None:
    with pytest.raises(ModelError, match=rf"attribute 'held' of module 'c\.1', a {kind}, cannot be copied"):
        _pruner(Net(lambda: Held(make)))
    model = Net()
    model.a.held = make(model.a)
    with pytest.raises(ModelError, match=rf"attribute 'held' of module 'a', a {kind}, cannot be copied"):
        _pruner(model)
    parts = Net(lambda: Held(make))
    with pytest.raises(ModelError, match=r"attribute 'held' of module 'segment2\.1'"):
        SigmaBPruner(None, DATA[0], segments=[parts.a, parts.b, parts.c, parts.d], calibration_data=DATA)


def test_an_attribute_of_the_root_is_not_copied() -> None:
    model = Net()
    model.lock = threading.Lock()
    assert _built(model)(DATA[0]).shape == (12, 5)


def test_another_error_is_not_explained_away() -> None:
    model = Net()
    model.lock = threading.Lock()
    with pytest.raises((RuntimeError, ModelError)) as caught:
        _pruner(model, example=DATA[0].double())
    assert "cannot be copied" not in str(caught.value)


def test_levels_as_a_string() -> None:
    message = r"levels has the wrong type: give a list of names, \['b'\] instead of 'b'"
    with pytest.raises(ConfigError, match=message):
        _pruner(Net(), levels="b")
    with pytest.raises(ConfigError, match=message):
        SigmaBConfig(levels="b")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        SigmaBConfig.from_dict({"levels": "b"})


def test_calibration_data_that_is_no_iterable() -> None:
    with pytest.raises(CalibrationError, match=r"is a function and cannot be iterated.*list\(\.\.\.\)"):
        _pruner(Net(), calibration_data=lambda: iter(DATA)).step()
    with pytest.raises(CalibrationError, match="is a int and cannot be iterated"):
        _pruner(Net(), calibration_data=3).step()


def test_calibration_data_by_index() -> None:
    class Indexed:
        def __getitem__(self, index: int) -> torch.Tensor:
            return DATA[index]

    pruner = _pruner(Net(), calibration_data=Indexed())
    assert sum(pruner.step().plan.splits[""].samples) == 36


def test_path_modules_of_no_leaf() -> None:
    net = _built(Net())
    assert [name for name, _ in net.path_modules("0/1")][-1] == "heads.0_1"
    for path in ("9/9", "0", "", "0_1"):
        with pytest.raises(ConfigError, match=rf"no leaf {path!r}; its leaves: 0/0, 0/1, 1/0, 1/1"):
            net.path_modules(path)


# Inputs by keyword -------------------------------------------------------------------------------


class Named(Net):
    def forward(self, *, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(rows * scale)


def test_macs_of_inputs_by_keyword() -> None:
    example = {"rows": DATA[0], "scale": torch.ones(12, 1)}
    model = Named()
    assert macs(model, example) == macs(Net(), DATA[0])
    batches = [{"rows": rows, "scale": torch.ones(12, 1)} for rows in DATA]
    net = _pruner(model, example=example, calibration_data=batches).step()
    plain = _built(Net())
    assert net.macs(example) == plain.macs(DATA[0])


def test_a_net_that_a_framework_wrapped_is_not_saved_without_what_it_added(tmp_path: Path) -> None:
    net = _built(Net())
    net.add_module("_quantizers", nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"tensors of a framework that wrapped it \(_quantizers\)"):
        save(net, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
