"""What a search returns: one row per run, ranked, with the spread that the best run hides."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .ranges import LayerRange


@dataclass(frozen=True)
class Run:
    """One strategy with one score.

    Attributes:
        score: what weights were dropped by; ``"structured"`` where channels were removed.
        strategy: how sparsities were taken from the ranges.
        sparsity: share of the model's parameters that is gone.
        validation: the caller's score on the validation split, after fine-tuning; NaN where that diverged.
        same_as: another run with the same sparsities, whose result this is.
    """

    score: str
    strategy: str
    sparsity: float
    validation: float
    seconds: float
    same_as: str | None = None

    @property
    def key(self) -> str:
        return f"{self.score}-{self.strategy}"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over the strategies of one score.

    Runs whose validation score is not finite are left out; where none is left, mean and best are NaN.
    """

    score: str
    runs: int
    mean: float
    sd: float
    best: float
    mean_sparsity: float


@dataclass(frozen=True)
class SearchResult:
    """Result of :func:`~sigmab_plugin.techniques.mix_and_match.search`.

    Attributes:
        dense: validation score of the model before pruning.
        runs: best first.
        chosen: the run that ``model`` and ``masks`` belong to.
        model: pruned and fine-tuned, in eval mode.
        masks: True = kept; empty after structured pruning.
    """

    dense: float
    ranges: tuple[LayerRange, ...]
    runs: tuple[Run, ...]
    chosen: Run
    model: nn.Module
    masks: dict[str, Tensor]

    def spreads(self) -> tuple[Spread, ...]:
        """One entry per score, over all of its strategies."""
        found = []
        for score in dict.fromkeys(run.score for run in self.runs):
            runs = [run for run in self.runs if run.score == score and math.isfinite(run.validation)]
            values = [run.validation for run in runs] or [math.nan]
            found.append(
                Spread(
                    score=score,
                    runs=len(runs),
                    mean=statistics.fmean(values),
                    sd=statistics.stdev(values) if len(values) > 1 else 0.0,
                    best=max(values),
                    mean_sparsity=statistics.fmean(run.sparsity for run in runs) if runs else math.nan,
                )
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; model and masks have files of their own."""
        return {
            "dense": self.dense,
            "chosen": self.chosen.key,
            "runs": [run.to_dict() for run in self.runs],
            "spreads": [dataclasses.asdict(spread) for spread in self.spreads()],
            "ranges": [dataclasses.asdict(layer) for layer in self.ranges],
        }

    def __str__(self) -> str:
        lines = [
            f"dense {self.dense:.4f}; chosen {self.chosen.key}",
            f"{'score':<12}{'strategy':<24}{'sparsity':>9}{'validation':>12}",
        ]
        for run in self.runs:
            mark = f"  = {run.same_as}" if run.same_as else ""
            lines.append(
                f"{run.score:<12}{run.strategy:<24}{run.sparsity:>9.3f}{run.validation:>12.4f}{mark}"
            )
        for spread in self.spreads():
            lines.append(
                f"{spread.score}: {spread.mean:.4f} +- {spread.sd:.4f} over {spread.runs} strategies "
                f"(best {spread.best:.4f}), mean sparsity {spread.mean_sparsity:.3f}"
            )
        return "\n".join(lines)


def rank(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Best validation score first; among equals the sparser, then by name. NaN is no score and comes last."""

    def place(run: Run) -> tuple[bool, float, float, str]:
        nothing = math.isnan(run.validation)
        return (nothing, 0.0 if nothing else -run.validation, -run.sparsity, run.key)

    return tuple(sorted(runs, key=place))


def choose(runs: Sequence[Run], dense: float, max_drop: float | None) -> Run:
    """The best score, or the sparsest run within ``max_drop`` of ``dense`` (to 1e-9) where there is one."""
    ranked = rank(runs)
    if max_drop is None:
        return ranked[0]
    within = [run for run in ranked if run.validation >= dense - max_drop - 1e-9]
    return max(within, key=lambda run: run.sparsity) if within else ranked[0]
