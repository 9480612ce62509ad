"""Several techniques on one network: which orders are refused, and carrying a list of sections out.

One table of rules serves everything that reads a list of sections. A rule names algorithms by their names in
config files; NNCF's own are among them, and an algorithm that no rule names may stand anywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import TechniqueConfig
from ..errors import ConfigError
from .base import Context, Technique

logger = logging.getLogger(__name__)

#: What changes the layers themselves.
RESTRUCTURING = ("depth_pruning", "torch_pruning", "filter_pruning", "sigmab")
#: NNCF's own that set single weights to zero.
SPARSIFYING = ("magnitude_sparsity", "rb_sparsity", "movement_sparsity")
#: What fixes the numbers of finished layers.
QUANTIZING = ("quantization", "weight_compression")


@dataclass(frozen=True)
class Rule:
    """``later`` must not stand anywhere after ``earlier``; ``reason`` completes "<later> after <earlier>: ...".

    Attributes:
        exclusive: the other order is no better, so no order is proposed.
        unless_between: the rule does not hold where this algorithm stands between the two.
    """

    earlier: tuple[str, ...]
    later: tuple[str, ...]
    reason: str
    exclusive: bool = False
    unless_between: str = ""


RULES: tuple[Rule, ...] = (
    Rule(
        ("sigmab",),
        ("sigmab",),
        "a network is restructured into a tree once; give all levels in one section",
        True,
    ),
    Rule(
        ("depth_pruning",),
        ("depth_pruning",),
        "the second cut would drop the head that the first one made; only a tree's leaves can be shortened again, "
        "with 'sigmab' between the two",
        exclusive=True,
        unless_between="sigmab",
    ),
    Rule(
        ("mix_and_match",),
        ("mix_and_match", *SPARSIFYING),
        "one set of masks replaces the other; choose one section",
        True,
    ),
    Rule(SPARSIFYING, ("mix_and_match",), "one set of masks replaces the other; choose one section", True),
    Rule(
        ("legonet",), ("legonet",), "the blocks are already centroids of a codebook; choose one section", True
    ),
    Rule(QUANTIZING, QUANTIZING, "the weights are already integers; choose one section", True),
    Rule(
        (*QUANTIZING, "knowledge_distillation"),
        (*RESTRUCTURING, "mix_and_match", "legonet"),
        "it changes weights or builds new layers, which would carry nothing of what was fixed before",
    ),
    Rule(
        ("rb_sparsity", "movement_sparsity"),
        RESTRUCTURING,
        "the one before finds its masks during training and would have none yet",
    ),
    Rule(
        ("mix_and_match",),
        RESTRUCTURING,
        "the masks belong to the layers as they were, and would be lost with them",
    ),
    Rule(
        ("sigmab",),
        ("torch_pruning",),
        "the plan of the tree records the widths of its branches, which would no longer hold, and the net could not "
        "be saved. For narrower branches use sigmab's 'active_ratio' or 'widths'",
    ),
    Rule(
        ("sigmab",),
        ("filter_pruning",),
        "the branches have been cut to their width already, and NNCF's groups of filters end where the leaves are "
        "mixed: it would mask a few filters of the backbone alone and none in the branches. For narrower branches use "
        "sigmab's 'active_ratio' or 'widths'",
    ),
    Rule(
        ("legonet",),
        RESTRUCTURING,
        "a codebook's blocks run across channels, so removing channels undoes them",
    ),
    Rule(
        ("legonet",),
        ("mix_and_match", *SPARSIFYING),
        "a weight that is set to zero no longer belongs to its block's centroid; choose one of the two",
        exclusive=True,
    ),
    Rule(
        ("mix_and_match", *SPARSIFYING),
        ("legonet",),
        "centroids are means of blocks, which do not keep single zeros; choose one of the two",
        exclusive=True,
    ),
    Rule(
        ("legonet",),
        QUANTIZING,
        "the expanded weights would be stored as one byte each instead of a fraction of a bit; choose one of the two",
        exclusive=True,
    ),
)

#: Where an algorithm stands in the order that is proposed; what is not named keeps its place after these.
_STAGE = {
    **dict.fromkeys(("depth_pruning",), 0),
    **dict.fromkeys(("torch_pruning", "filter_pruning"), 1),
    **dict.fromkeys(("sigmab",), 2),
    **dict.fromkeys(("mix_and_match", *SPARSIFYING), 4),
    **dict.fromkeys(("legonet",), 5),
    **dict.fromkeys(("knowledge_distillation",), 6),
    **dict.fromkeys(QUANTIZING, 7),
}
_LEAVES, _OTHER = 3, 4


@dataclass(frozen=True)
class OrderProblem:
    """Two positions of a list that cannot stand in this order.

    Attributes:
        earlier, later: positions in the list.
        reason: why.
        proposal: the same algorithms in a sensible order; empty where there is none.
    """

    algorithms: tuple[str, ...]
    earlier: int
    later: int
    reason: str
    proposal: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.algorithms[self.later]!r} after {self.algorithms[self.earlier]!r}: {self.reason}."
        if self.proposal:
            text += f" Sensible order: {' -> '.join(self.proposal)}."
        return text


def order_problems(algorithms: Sequence[str]) -> tuple[OrderProblem, ...]:
    """Every violation of :data:`RULES` in a list of algorithm names, by the position of the later one."""
    return tuple(
        OrderProblem(
            tuple(algorithms),
            earlier,
            later,
            rule.reason,
            () if rule.exclusive else sensible_order(algorithms),
        )
        for rule, earlier, later in _violations(algorithms)
    )


def check_order(algorithms: Sequence[str]) -> None:
    """Raise a :class:`ConfigError` that proposes the sensible order where a list makes no sense."""
    for problem in order_problems(algorithms):
        raise ConfigError(str(problem))


def sensible_order(algorithms: Sequence[str]) -> tuple[str, ...]:
    """The same algorithms in an order that breaks no rule, unchanged if it breaks none; empty if there is no such."""
    if not any(True for _ in _violations(algorithms)):
        return tuple(algorithms)
    tree = algorithms.index("sigmab") if "sigmab" in algorithms else len(algorithms)
    stages = []
    for index, name in enumerate(algorithms):
        shortens_leaves = name == "depth_pruning" and "depth_pruning" in algorithms[:index] and index > tree
        stages.append(_LEAVES if shortens_leaves else _STAGE.get(name, _OTHER))
    order = tuple(algorithms[index] for index in sorted(range(len(algorithms)), key=lambda i: stages[i]))
    return () if any(True for _ in _violations(order)) else order


def _violations(algorithms: Sequence[str]) -> Iterator[tuple[Rule, int, int]]:
    for later, name in enumerate(algorithms):
        for earlier in range(later):
            for rule in RULES:
                if name not in rule.later or algorithms[earlier] not in rule.earlier:
                    continue
                if rule.unless_between not in algorithms[earlier + 1 : later] or not rule.unless_between:
                    yield rule, earlier, later


@dataclass(frozen=True)
class Step:
    """One section that was carried out: its name, its options, the network after it, and the time."""

    algorithm: str
    config: TechniqueConfig
    network: nn.Module
    seconds: float


def parse_sections(
    sections: Sequence[Mapping[str, Any]], techniques: Mapping[str, Technique]
) -> list[tuple[Technique, TechniqueConfig]]:
    """Check sections and their order without touching a network.

    Raises:
        ConfigError: no algorithm, an unknown one, a wrong option, or an order that makes no sense.
    """
    parsed = []
    for position, section in enumerate(sections):
        name = section.get("algorithm")
        if not isinstance(name, str):
            raise ConfigError(
                f"section {position} has no 'algorithm'; known: {', '.join(sorted(techniques))}"
            )
        if name not in techniques:
            raise ConfigError(
                f"section {position}: unknown algorithm {name!r}; known: {', '.join(sorted(techniques))}"
            )
        parsed.append((techniques[name], techniques[name].config.from_dict(section)))
    check_order([technique.name for technique, _ in parsed])
    return parsed


def run_sections(
    model: nn.Module,
    sections: Sequence[Mapping[str, Any]],
    context: Context,
    *,
    techniques: Mapping[str, Technique],
    after_step: Callable[[Step], nn.Module] | None = None,
) -> list[Step]:
    """Carry a list of sections out, each on the network of the one before.

    Args:
        model: left as it was.
        sections: config-file sections, in order; all are checked before the first one runs.
        context: given to every technique.
        techniques: algorithm name -> technique.
        after_step: called after every section; the network that it returns goes on (fine-tuning).

    Returns:
        One :class:`Step` per section; the last one holds the result.

    Raises:
        ConfigError: see :func:`parse_sections`; and what the techniques raise.
    """
    parsed = parse_sections(sections, techniques)
    steps: list[Step] = []
    network = model
    for technique, config in parsed:
        start = time.perf_counter()
        network = technique.apply(network, config, context)
        step = Step(technique.name, config, network, time.perf_counter() - start)
        if after_step is not None:
            network = after_step(step)
            step = Step(technique.name, config, network, time.perf_counter() - start)
        logger.info("%s: done in %.1f s", technique.name, step.seconds)
        steps.append(step)
    return steps
