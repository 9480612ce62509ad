"""What a report shows, as plain data: written as JSON beside the page and readable again.

Nothing here needs torch; :mod:`.counts` and :mod:`.analysis` fill these from networks and samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError

VERSION = 1

#: Roles of a row; they choose its colour and the comparisons that the page may make.
ROLES = ("dense", "sigmab", "twin", "other")


@dataclass(frozen=True)
class Row:
    """One network in the table of accuracy and size.

    Attributes:
        name: as printed.
        role: ``dense``, ``sigmab``, ``twin`` (static, one path of the same shape) or ``other``.
        accuracy: share of held-out samples classified correctly, 0 to 1; None if not measured.
        active_parameters: read for one input; for a tree the largest path.
        stored_parameters: all that is kept.
        active_macs: multiply-accumulates of one sample; for a tree the largest path.
        active_bytes: parameters and buffers that one input reads.
        stored_bytes: parameters and buffers of the whole network.
        accuracy_sd: standard deviation over repeats, where there were any.
    """

    name: str
    role: str
    accuracy: float | None
    active_parameters: int
    stored_parameters: int
    active_macs: int | None
    active_bytes: int
    stored_bytes: int
    accuracy_sd: float | None = None


@dataclass(frozen=True)
class TreePart:
    """A module of the tree: ``path`` is "" for the backbone and the root's router."""

    kind: str  # backbone | router | specializer | head
    path: str
    parameters: int
    width: int | None = None


@dataclass(frozen=True)
class TreeFigure:
    """The tree as drawn. ``levels`` and ``head`` are the dense model's module names."""

    parts: tuple[TreePart, ...]
    leaves: tuple[str, ...]
    levels: tuple[str, ...] = ()
    head: str = ""


@dataclass(frozen=True)
class LeafStatistics:
    """Where held-out samples went: ``counts[class][leaf]`` samples.

    Attributes:
        leaves: leaf paths, column order of ``counts``.
        classes: class names, row order.
        counts: samples per class and leaf.
        correct: of those, classified correctly; None if targets were not compared.
    """

    leaves: tuple[str, ...]
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    correct: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class ChannelPanel:
    """Mean activation of every dense channel under both clusters of a node, and who keeps it.

    ``kept[c]`` is ``shared``, ``0``, ``1`` or ``dropped``; lengths agree with ``activation``'s rows, in which None
    is a value that was not finite.
    """

    node: str
    group: str
    activation: tuple[tuple[float | None, ...], tuple[float | None, ...]]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """One training run: ``values[metric][i]`` belongs to ``epochs[i]``; None where not recorded.

    Metrics the page draws: ``train_loss``, ``val_accuracy``, ``balance``, ``leaf_shares`` (a list).
    """

    name: str
    role: str
    epochs: tuple[int, ...]
    values: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of the page that a caller adds: a title and trusted HTML."""

    title: str
    html: str


@dataclass(frozen=True)
class ReportData:
    """All that a report is made from.

    Attributes:
        title: heading of the page.
        summary: one or two sentences under the heading.
        facts: short label -> value pairs for the header (model, data, date ...).
        rows: networks compared, dense first.
        provenance: how it was made: command, seed, versions.
        notes: sentences the reader must know to judge the figures.
        sections: further parts, after the built-in ones.
    """

    title: str
    summary: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    tree: TreeFigure | None = None
    leaves: LeafStatistics | None = None
    channels: tuple[ChannelPanel, ...] = ()
    curves: tuple[Curve, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, with a version; numbers that are not finite, which JSON lacks, become null."""
        return {"format": "sigmab-report", "version": VERSION, **_finite(dataclasses.asdict(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ReportData:
        """Read what :meth:`to_dict` wrote.

        Raises:
            FormatError: not a report, or one of a newer version.
        """
        if not isinstance(data, Mapping) or data.get("format") != "sigmab-report":
            raise FormatError("not a SigmaB report: expected the JSON that stands beside a report page")
        if data.get("version") != VERSION:
            raise FormatError(
                f"this report has version {data.get('version')!r}, this release reads version {VERSION}; "
                "upgrade sigmab-plugin"
            )
        try:
            return cls(
                title=data["title"],
                summary=data["summary"],
                facts=dict(data["facts"]),
                rows=tuple(Row(**row) for row in data["rows"]),
                tree=_tree(data["tree"]),
                leaves=_leaves(data["leaves"]),
                channels=tuple(
                    ChannelPanel(
                        node=panel["node"],
                        group=panel["group"],
                        activation=(tuple(panel["activation"][0]), tuple(panel["activation"][1])),
                        kept=tuple(panel["kept"]),
                    )
                    for panel in data["channels"]
                ),
                curves=tuple(
                    Curve(**{**curve, "epochs": tuple(curve["epochs"])}) for curve in data["curves"]
                ),
                provenance=dict(data["provenance"]),
                notes=tuple(data["notes"]),
                sections=tuple(Section(**section) for section in data["sections"]),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise FormatError(f"this report is incomplete or was altered: {error}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tree(data: Mapping[str, Any] | None) -> TreeFigure | None:
    if data is None:
        return None
    return TreeFigure(
        parts=tuple(TreePart(**part) for part in data["parts"]),
        leaves=tuple(data["leaves"]),
        levels=tuple(data["levels"]),
        head=data["head"],
    )


def _leaves(data: Mapping[str, Any] | None) -> LeafStatistics | None:
    if data is None:
        return None
    correct = data["correct"]
    return LeafStatistics(
        leaves=tuple(data["leaves"]),
        classes=tuple(data["classes"]),
        counts=tuple(tuple(row) for row in data["counts"]),
        correct=None if correct is None else tuple(tuple(row) for row in correct),
    )
