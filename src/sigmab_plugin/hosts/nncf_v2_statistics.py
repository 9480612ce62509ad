"""Statistics of NNCF 2.x: tables for the techniques, and any algorithm's statistics in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nncf.api.statistics import Statistics
from nncf.common.pruning.statistics import FilterPruningStatistics
from nncf.common.quantization.statistics import QuantizationStatistics
from nncf.common.statistics import NNCFStatistics
from nncf.common.utils.helpers import create_table

from ..tree.net import ParameterCounts
from .nncf_schema import tree_line


class TechniqueStatistics(NNCFStatistics):
    """NNCF's statistics, open to algorithm names that NNCF does not list."""

    def __init__(self) -> None:
        super().__init__()
        self._others: dict[str, Statistics] = {}

    def register(self, algorithm_name: str, stats: Statistics) -> None:
        try:
            super().register(algorithm_name, stats)
        except ValueError:
            self._others[algorithm_name] = stats

    def __iter__(self) -> Iterator[tuple[str, Statistics]]:
        return iter([*super().__iter__(), *self._others.items()])

    def to_str(self) -> str:
        return "\n\n".join(statistics.to_str() for _, statistics in self)

    def __getattr__(self, name: str) -> Statistics:
        others = self.__dict__.get("_others", {})
        if name in others:
            return others[name]
        raise AttributeError(name)


class FinishedStatistics(Statistics):
    """What an algorithm had done when it was carried out before the restructuring: its table, and one line."""

    def __init__(self, name: str, table: str, line: str) -> None:
        self.name, self.table, self.line = name, table, line

    def to_str(self) -> str:
        return f"{self.name}, before the restructuring:\n{self.table}"


class TreeStatistics(Statistics):
    """Parameters of a SigmaB net (without what other algorithms add, such as quantizers' scales), as a table."""

    def __init__(self, counts: ParameterCounts, dense_parameters: int) -> None:
        self.dense = dense_parameters
        self.stored = counts.total
        self.active = counts.active
        self.backbone = counts.backbone
        self.routers = counts.routers
        self.per_path = dict(counts.per_path)

    def to_str(self) -> str:
        def row(name: str, count: int) -> list[Any]:
            return [name, count, f"{100 * count / self.dense:.1f} %" if self.dense else "-"]

        rows = [
            row("dense network", self.dense),
            row("stored (all branches)", self.stored),
            row("active (largest path)", self.active),
            row("backbone", self.backbone),
            row("routers and projections", self.routers),
            *(row(f"path {path}", count) for path, count in self.per_path.items()),
        ]
        return "Statistics of the SigmaB restructuring:\n" + create_table(
            header=["Part", "Parameters", "Of dense"], rows=rows
        )


class ParameterStatistics(Statistics):
    """What a technique did, as a table. ``line`` and ``facts`` are :func:`.nncf_outcome.outcome`'s."""

    def __init__(self, name: str, line: str, facts: Mapping[str, Any]) -> None:
        self.name, self.line, self.facts = name, line, dict(facts)

    def to_str(self) -> str:
        facts = self.facts
        rows = [
            ["before", facts["before"], facts["bytes_before"]],
            ["after", facts["after"], facts["bytes"]],
        ]
        header = ["Network", "Parameters", "Bytes as stored"]
        return f"Statistics of {self.name}:\n" + create_table(header=header, rows=rows)


def summary(statistics: Statistics) -> tuple[str, dict[str, Any]]:
    """One line for people and the same figures for machines; a table without a known form gives its first line."""
    if isinstance(statistics, TreeStatistics):
        facts: dict[str, Any] = {
            "dense": statistics.dense,
            "stored": statistics.stored,
            "active": statistics.active,
        }
        return tree_line(
            statistics.dense, statistics.stored, statistics.active, len(statistics.per_path)
        ), facts
    if isinstance(statistics, ParameterStatistics):
        return statistics.line, statistics.facts
    if isinstance(statistics, FinishedStatistics):
        return statistics.line, {}
    if isinstance(statistics, QuantizationStatistics):
        weights, activations = statistics.wq_counter.total_count, statistics.aq_counter.total_count
        facts = {"weight_quantizers": weights, "activation_quantizers": activations}
        return f"{weights} weight quantizers and {activations} activation quantizers", facts
    if isinstance(statistics, FilterPruningStatistics):
        model = statistics.model_statistics
        facts = {"filters_before": model.full_filters_num, "filters": model.current_filters_num}
        text = f"{model.current_filters_num:,} of {model.full_filters_num:,} filters left after masking"
        return f"{text} (target {100 * statistics.target_pruning_level:.0f} %)", facts
    model = getattr(statistics, "model_statistics", None)
    level = getattr(model, "sparsity_level_for_layers", None)
    if level is None:
        return next((line for line in statistics.to_str().splitlines() if line.strip()), ""), {}
    text = f"{100 * level:.1f} % of the weights masked in the layers it acts on"
    target = getattr(statistics, "target_sparsity_level", None)
    if target is not None and abs(target - level) > 0.005:
        text += f" (this step of its schedule: {100 * target:.0f} %)"
    return text, {"sparsity": float(level)}
