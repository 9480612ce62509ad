"""Which weights Mix-and-Match takes, and the ranges it observes: tied and parametrized weights, integers, NaN."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sigmab_plugin.errors import CalibrationError, ModelError
from sigmab_plugin.techniques.mix_and_match import (
    LayerWeight,
    MixAndMatchConfig,
    SearchResult,
    Sensitivity,
    find_layers,
    observe_ranges,
    search,
)

INPUTS = torch.linspace(-1, 1, 32 * 16).reshape(32, 16).sin()
DATA = [(INPUTS, torch.arange(32) % 4)]
CONFIG = MixAndMatchConfig(
    finetune_epochs=0,
    criteria=("magnitude",),
    scores=("magnitude",),
    strategies=("max",),
    small_layer_parameters=0,
)


def run_search(model: nn.Module, **changes: Any) -> SearchResult:
    return search(
        model,
        CONFIG.replace(**changes),
        example_inputs=INPUTS,
        train_data=DATA,
        validate=lambda net: float(net(INPUTS).isfinite().all()),
    )


class Tied(nn.Module):
    """Two layers with one weight, which the network itself may own."""

    def __init__(self, owned: bool = False) -> None:
        super().__init__()
        if owned:
            self.weight = nn.Parameter(torch.randn(16, 16))
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        if owned:
            self.first.weight = self.weight
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.second(self.first(x).tanh()).tanh())
        return logits


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_weight_that_an_ignored_layer_shares_stays_dense(name: str) -> None:
    result = run_search(Tied(), ignored_layers=(name,))
    assert [layer.name for layer in result.ranges] == ["last.weight"]
    assert (result.model.second.weight != 0).all()  # type: ignore[union-attr, operator]


def test_a_weight_that_the_network_owns_is_pruned_in_its_layers(caplog: pytest.LogCaptureFixture) -> None:
    result = run_search(Tied(owned=True))
    assert not caplog.messages
    assert set(result.masks) == {"first.weight", "last.weight"}
    assert int((result.model.weight == 0).sum()) == int((~result.masks["first.weight"]).sum()) > 0


class Normed(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = weight_norm(nn.Linear(16, 16)), last
        self.own = Own()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.own(self.first(x)))
        return logits


class Own(nn.Module):
    """A weight beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.child = nn.Parameter(torch.randn(16, 16)), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.child(x @ self.weight)
        return out


def test_what_stays_dense_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Normed(nn.Linear(16, 4))
    with caplog.at_level(logging.WARNING):
        result = run_search(model)
    assert [layer.name for layer in result.ranges] == ["last.weight"]
    (line,) = [message for message in caplog.messages if "dense" in message]
    assert "first, own stay dense" in line
    caplog.clear()
    run_search(model, ignored_layers=("first", "own"))
    assert not [message for message in caplog.messages if "dense" in message]
    with pytest.raises(ModelError, match="remove_parametrizations"):
        find_layers(Normed(weight_norm(nn.Linear(16, 4))), INPUTS)


def test_integer_parameters_are_no_obstacle() -> None:
    model = Tied()
    model.order = nn.Parameter(torch.arange(16), requires_grad=False)
    assert run_search(model).masks


class Rooted(nn.Module):
    """sqrt(relu(x)): no derivative at 0. Torch gives NaN for the second, and for the first with ``steep``."""

    def __init__(self, steep: bool) -> None:
        super().__init__()
        self.first, self.last, self.steep = nn.Linear(16, 16), nn.Linear(16, 4), steep

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = (hidden - hidden).square().sqrt() if self.steep else hidden.relu().sqrt()
        logits: Tensor = self.last(hidden)
        return logits


def test_derivatives_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'first.weight' are not finite.*'grasp'"):
        run_search(Rooted(False), criteria=("snip", "grasp"))
    assert run_search(Rooted(False), criteria=("snip",)).masks
    with pytest.raises(CalibrationError, match=r"gradient of the loss by 'first.weight'"):
        run_search(Rooted(True), criteria=("snip",))


def test_limits_of_one_role_leave_those_of_the_others() -> None:
    config = MixAndMatchConfig(role_limits={"feature": (0.0, 1.0)})
    assert config.role_limits == {**MixAndMatchConfig().role_limits, "feature": (0.0, 1.0)}
    assert MixAndMatchConfig.from_dict(config.to_dict()) == config
    layers = [
        LayerWeight(f"{role}.weight", role, role, 100) for role in ("embedding", "feature", "attention")
    ]
    weights = {layer.name: torch.linspace(1, 2, 100) * 10**place for place, layer in enumerate(layers)}
    sensitivity = Sensitivity(weights, {}, {})
    ranges = observe_ranges(
        layers, sensitivity, config.replace(criteria=("magnitude",), sparsities=(0.3, 0.7))
    )
    assert [layer.maximum for layer in ranges] == [
        0.0,
        0.99,
        0.1,
    ]  # never all of a layer, whatever the role's limits


def test_among_equal_weights_the_earlier_go() -> None:
    """Dead units have importance 0 in many places; a global sparsity takes no more of them than it says."""
    layers = [LayerWeight(f"{name}.weight", name, "feature", 100) for name in ("first", "second")]
    weights = {layer.name: torch.cat([torch.zeros(60), torch.ones(40)]) for layer in layers}
    config = MixAndMatchConfig(criteria=("magnitude",), sparsities=(0.2, 0.5, 0.50000001, 0.8))
    first, second = observe_ranges(layers, Sensitivity(weights, {}, {}), config)
    expected = {0.2: (0.4, 0.0), 0.5: (0.6, 0.4), 0.50000001: (0.6, 0.4), 0.8: (1.0, 0.6)}
    assert first.observed == {f"magnitude@{sparsity}": share for sparsity, (share, _) in expected.items()}
    assert second.observed == {f"magnitude@{sparsity}": share for sparsity, (_, share) in expected.items()}
