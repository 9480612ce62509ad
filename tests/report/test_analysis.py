from __future__ import annotations

import pytest

from sigmab_plugin.errors import ConfigError
from sigmab_plugin.report import leaf_shares, leaf_statistics
from sigmab_plugin.report.analysis import class_purity, kept_roles, leaf_accuracy, prefix_share
from sigmab_plugin.report.charts import ticks

LEAVES = ("0/0", "0/1", "1/0", "1/1")


def test_samples_are_counted_by_class_and_leaf() -> None:
    statistics = leaf_statistics(
        [0, 0, 3, 1], [0, 0, 1, 1], leaves=LEAVES, classes=("a", "b"), prediction=[0, 1, 1, 1]
    )
    assert statistics.counts == ((2, 0, 0, 0), (0, 1, 0, 1))
    assert leaf_shares(statistics) == (0.5, 0.25, 0.0, 0.25)
    assert leaf_accuracy(statistics) == (0.5, 1.0, None, 1.0)
    assert class_purity(statistics) == 0.75


def test_shares_add_up_on_the_way_down() -> None:
    shares = (0.5, 0.25, 0.0, 0.25)
    assert prefix_share(shares, LEAVES, "") == 1.0
    assert prefix_share(shares, LEAVES, "0") == 0.75
    assert prefix_share(shares, LEAVES, "1/1") == 0.25
    # "1" is no prefix of "10": paths are compared by step.
    assert prefix_share((0.5, 0.5), ("1/0", "10/0"), "1") == 0.5


def test_no_samples_give_zero_shares_and_no_purity() -> None:
    statistics = leaf_statistics([], [], leaves=LEAVES, classes=("a",), prediction=[])
    assert leaf_shares(statistics) == (0.0,) * 4
    assert class_purity(statistics) is None
    assert leaf_accuracy(statistics) == (None,) * 4


def test_lengths_and_indices_are_checked() -> None:
    with pytest.raises(ConfigError, match="2 leaf indices for 1 targets"):
        leaf_statistics([0, 1], [0], leaves=LEAVES, classes=("a",))
    with pytest.raises(ConfigError, match="leaf 4"):
        leaf_statistics([4], [0], leaves=LEAVES, classes=("a",))


def test_every_channel_has_one_role() -> None:
    # Channel 2 is specific in both branches: what both keep counts as shared, however it was chosen.
    assert kept_roles(6, [[0, 1, 2], [0, 2, 4]]) == ("shared", "0", "shared", "dropped", "1", "dropped")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.55, 0.98, [0.6, 0.7, 0.8, 0.9]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
