"""Figures derived from samples and plans: leaf shares, balance, who keeps which channel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..errors import ConfigError
from .data import ChannelPanel, LeafStatistics


def leaf_statistics(
    leaf: Sequence[int],
    target: Sequence[int],
    *,
    leaves: Sequence[str],
    classes: Sequence[str],
    prediction: Sequence[int] | None = None,
) -> LeafStatistics:
    """Count samples per class and leaf.

    Args:
        leaf: leaf index of every sample.
        target: class index of every sample, in the same order.
        leaves: leaf paths; position is the index.
        classes: class names; position is the index.
        prediction: predicted class of every sample; adds the count of correct ones.

    Raises:
        ConfigError: lengths differ or an index has no name.
    """
    if len(leaf) != len(target) or (prediction is not None and len(prediction) != len(target)):
        raise ConfigError(f"{len(leaf)} leaf indices for {len(target)} targets; give one of each per sample")
    counts = [[0] * len(leaves) for _ in classes]
    correct = [[0] * len(leaves) for _ in classes]
    for position, (k, y) in enumerate(zip(leaf, target, strict=True)):
        if not (0 <= k < len(leaves) and 0 <= y < len(classes)):
            raise ConfigError(f"sample {position}: leaf {k} or class {y} has no name")
        counts[y][k] += 1
        if prediction is not None:
            correct[y][k] += int(prediction[position] == y)
    return LeafStatistics(
        leaves=tuple(leaves),
        classes=tuple(classes),
        counts=tuple(map(tuple, counts)),
        correct=None if prediction is None else tuple(map(tuple, correct)),
    )


def leaf_shares(statistics: LeafStatistics) -> tuple[float, ...]:
    """Share of samples per leaf, in order of ``statistics.leaves``; zeros if there are no samples."""
    totals = [sum(column) for column in zip(*statistics.counts, strict=True)] or [0] * len(statistics.leaves)
    samples = sum(totals)
    return tuple(total / samples if samples else 0.0 for total in totals)


def prefix_share(shares: Sequence[float], leaves: Sequence[str], path: str) -> float:
    """Share of samples whose path starts with ``path`` ("" is the root)."""
    return sum(share for share, leaf in zip(shares, leaves, strict=True) if is_under(leaf, path))


def is_under(leaf: str, path: str) -> bool:
    """Whether ``leaf`` is ``path`` or lies below it; everything lies below the root, ""."""
    return not path or leaf == path or leaf.startswith(f"{path}/")


def leaf_accuracy(statistics: LeafStatistics) -> tuple[float | None, ...]:
    """Accuracy of each leaf on the samples that it received; None where none came or none was compared."""
    if statistics.correct is None:
        return (None,) * len(statistics.leaves)
    hits = [sum(column) for column in zip(*statistics.correct, strict=True)]
    totals = [sum(column) for column in zip(*statistics.counts, strict=True)]
    return tuple(hit / total if total else None for hit, total in zip(hits, totals, strict=True))


def class_purity(statistics: LeafStatistics) -> float | None:
    """Share of samples in their class's largest leaf: 1 means that every class has one leaf."""
    samples = sum(map(sum, statistics.counts))
    return sum(max(row, default=0) for row in statistics.counts) / samples if samples else None


def kept_roles(channels: int, keep: Sequence[Iterable[int]]) -> tuple[str, ...]:
    """Role of each of a group's ``channels``: ``shared`` (both branches keep it), ``0``, ``1`` or ``dropped``."""
    first, second = (set(indices) for indices in keep)
    return tuple(
        "shared" if c in first and c in second else "0" if c in first else "1" if c in second else "dropped"
        for c in range(channels)
    )


def panel_counts(panel: ChannelPanel) -> dict[str, int]:
    """Channels per role, in the order in which the page lists them."""
    return {role: panel.kept.count(role) for role in ("shared", "0", "1", "dropped")}


def last_value(values: Sequence[float | None]) -> float | None:
    """The last recorded, finite value of a metric; None if there is none."""
    return next((value for value in reversed(values) if value is not None and math.isfinite(value)), None)
