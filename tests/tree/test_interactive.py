"""``step(interactive=True)``: what the caller may do between two allocations, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBNet, SigmaBPruner
from sigmab_plugin.errors import ConfigError
from sigmab_plugin.tree.build import Allocation

DATA = [torch.randn(12, 10, generator=torch.Generator().manual_seed(n)) for n in range(3)]
Edit = Callable[[Allocation], Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 12)
        self.b = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.c = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.Dropout())
        self.d = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def _pruner() -> SigmaBPruner:
    torch.manual_seed(0)
    return SigmaBPruner(Net(), DATA[0], levels=["b", "c"], head="d", projection_dim=8, calibration_data=DATA)


def _edited(edit: Edit) -> SigmaBNet:
    pruner = _pruner()
    for allocation in pruner.step(interactive=True):
        edit(allocation)
    return pruner.net


def _each(change: Callable[[torch.Tensor], Any]) -> Edit:
    def edit(allocation: Allocation) -> None:
        for name, index in allocation.keep.items():
            allocation.keep[name] = change(index)

    return edit


def test_the_callers_modes_hold_between_allocations() -> None:
    pruner = _pruner()
    model = pruner.model.train()
    model.c.eval()
    before = [module.training for module in model.modules()]
    for allocation in pruner.step(interactive=True):
        assert torch.is_grad_enabled(), allocation.path
        assert [module.training for module in model.modules()] == before, allocation.path
        model.zero_grad()
        nn.functional.cross_entropy(model(DATA[0]), torch.arange(12) % 5).backward()
        assert model.d.weight.grad is not None
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


def test_a_mode_that_the_caller_sets_meanwhile_stays_and_changes_nothing() -> None:
    def edit(allocation: Allocation) -> None:
        pruner.model.train()

    pruner = _pruner()
    pruner.model.eval()
    for allocation in pruner.step(interactive=True):
        edit(allocation)
    assert all(module.training for module in pruner.model.modules())
    assert pruner.net.plan == _pruner().step().plan, "dropout must be off while latents are read"


@pytest.mark.parametrize("steps", [1, 3])
def test_an_abandoned_generator_leaves_no_trace(steps: int) -> None:
    pruner = _pruner()
    pruner.model.train()
    allocations: Iterator[Allocation] = pruner.step(interactive=True)
    for number, _ in enumerate(allocations, start=1):
        if number == steps:
            break
    assert torch.is_grad_enabled(), "the generator is alive here"
    assert all(module.training for module in pruner.model.modules())
    pruner.model.eval()
    del allocations
    assert torch.is_grad_enabled()
    assert not any(module.training for module in pruner.model.modules()), (
        "set after the generator's last step"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.tolist(),
        lambda i: tuple(i.tolist()),
        lambda i: i.numpy(),
        lambda i: i.numpy().astype(np.int16),
    ],
    ids=["list", "tuple", "array", "int16 array"],
)
def test_indices_in_any_form(change: Callable[[torch.Tensor], Any]) -> None:
    net = _edited(_each(change))
    assert net.plan == _pruner().step().plan
    assert all(type(i) is int for b in net.plan.branches.values() for kept in b.keep.values() for i in kept)


def test_another_number_of_channels_is_taken_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sigmab_plugin"):
        net = _edited(_each(lambda index: index[:3].tolist()))
    assert net(DATA[0]).shape == (12, 5)
    assert {len(kept) for branch in net.plan.branches.values() for kept in branch.keep.values()} == {3}
    assert "3 channels instead of the 11 planned" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.float(), "integer indices, not float32"),
        (lambda i: [0.5, 1.5], "integer indices, not float32"),
        (lambda i: torch.isin(torch.arange(40), i), r"for a mask, mask.nonzero\(\).flatten\(\)"),
        (lambda i: None, "must hold indices; got None"),
        (lambda i: ["b.0"], "must hold indices"),
        (lambda i: [[0, 1], [2]], "must hold indices"),
        (lambda i: [], "non-empty 1-D"),
        (lambda i: torch.tensor(3), "non-empty 1-D"),
        (lambda i: [[0, 1]], "non-empty 1-D"),
        (lambda i: [1, 0], "ascend"),
        (lambda i: [0, 0], "ascend"),
        (lambda i: [-1, 0], "ascend"),
        (lambda i: np.array([0, 16]), r"within 0\.\.15"),
    ],
)
def test_what_is_no_index(change: Callable[[torch.Tensor], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"branch 0, channels of 'b\.0'.*{message}"):
        _edited(_each(change))


def _other_level(allocation: Allocation) -> None:
    if allocation.level == "c":
        allocation.keep["b.0"] = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.keep.update(zzz=[0]), r"branch 0: .*exactly 'b\.0'; cannot be chosen here: 'zzz'"),
        (lambda a: a.keep.update({"d": [0, 1]}), "cannot be chosen here: 'd'"),
        (_other_level, r"branch 0/0: .*exactly 'c\.0', 'c\.2'; cannot be chosen here: 'b\.0'"),
        (lambda a: a.keep.clear(), r"missing: 'b\.0'$"),
        (
            lambda a: a.keep.update({"c.0": a.keep.pop("b.0")}),
            r"cannot be chosen here: 'c\.0'; missing: 'b\.0'",
        ),
        (lambda a: a.level == "d" and a.keep.update(d=[0, 1]), "exactly nothing; cannot be chosen here: 'd'"),
    ],
    ids=["unknown", "complete", "other level", "missing", "renamed", "head"],
)
def test_names_are_fixed(edit: Edit, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _edited(edit)
