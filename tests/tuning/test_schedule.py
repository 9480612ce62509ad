"""Learning rate and router temperature by step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sigmab_plugin.errors import ConfigError
from sigmab_plugin.tuning.losses import hard_leaf, temper
from sigmab_plugin.tuning.recipe import TrainRecipe
from sigmab_plugin.tuning.schedule import learning_rate, router_temperature


def rates(recipe: TrainRecipe, epochs: int, steps: int) -> list[float]:
    return [
        learning_rate(recipe, step, steps_per_epoch=steps, epochs=epochs) for step in range(epochs * steps)
    ]


def test_cosine_with_warm_up() -> None:
    curve = rates(TrainRecipe(lr=0.1, warmup_epochs=2), epochs=10, steps=5)
    assert curve[:10] == pytest.approx([0.01 * (i + 1) for i in range(10)])
    assert curve[10] == 0.1
    assert curve[30] == pytest.approx(0.05)
    assert curve[-1] == pytest.approx(0.05 * (1 + math.cos(math.pi * 39 / 40)))
    assert all(a > b for a, b in itertools.pairwise(curve[10:]))


def test_cosine_equals_torchs() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(TrainRecipe(lr=0.3, warmup_epochs=0), epochs=4, steps=3) == pytest.approx(expected)


def test_step_decays_every_twenty_epochs() -> None:
    curve = rates(TrainRecipe.published("modelnet40"), epochs=45, steps=2)
    assert curve[0] == curve[39] == 1e-3
    assert curve[40] == curve[79] == pytest.approx(0.7e-3)
    assert curve[80] == pytest.approx(0.49e-3)


@given(
    st.sampled_from(["cosine", "step", "constant"]),
    st.floats(0, 20),
    st.integers(1, 12),
    st.integers(1, 9),
)
def test_rates_stay_between_zero_and_the_peak(kind: str, warmup: float, epochs: int, steps: int) -> None:
    curve = rates(TrainRecipe(lr=0.2, schedule=kind, warmup_epochs=warmup), epochs, steps)
    assert all(0 < rate <= 0.2 + 1e-12 for rate in curve)


def test_temperature_is_annealed_to_one_before_the_hard_phase() -> None:
    recipe = TrainRecipe(router_temperature=8.0, hard_epochs=2)
    values = [router_temperature(recipe, epoch, epochs=6) for epoch in range(6)]
    assert values == pytest.approx([8.0, 8.0 ** (2 / 3), 8.0 ** (1 / 3), 1.0, 1.0, 1.0])
    assert router_temperature(TrainRecipe(), 0, epochs=6) == 1.0


@given(st.floats(0.2, 8.0), st.integers(0, 1000))
def test_tempering_divides_the_logits_of_every_router(temperature: float, seed: int) -> None:
    leaves = ("0/0", "0/1", "1/0", "1/1")
    logits = 3 * torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def paths(scale: float) -> torch.Tensor:
        root, left, right = (part.log_softmax(1) for part in logits / scale)
        return torch.cat([root[:, :1] + left, root[:, 1:] + right], 1)

    softened = temper(paths(1.0), leaves, temperature)
    torch.testing.assert_close(softened, paths(temperature))
    assert torch.equal(hard_leaf(softened, leaves), hard_leaf(paths(1.0), leaves))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"lr": 0.0}, "lr must be more than 0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"label_smoothing": 1.0}, "label_smoothing must be less than 1"),
        ({"momentum": 0.0}, "nesterov needs momentum"),
        ({"hard_epochs": -1}, "hard_epochs must be at least 0"),
        ({"freeze_backbone": True, "bn_reestimation": True}, "choose one"),
    ],
)
def test_recipes_that_cannot_work(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainRecipe().replace(**changes)
