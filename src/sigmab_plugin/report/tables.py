"""Tables as text, Markdown and JSON.

Active and stored parameters, MACs and bytes always stand together, and the static twin (one path of
the same shape) beside the tree: an active count alone would hide what the tree costs.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import format as fmt
from .data import Row


@dataclass(frozen=True)
class Table:
    """Cells as printed; ``numeric`` columns are aligned to the right."""

    headers: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]

    def text(self) -> str:
        """Columns aligned with spaces, a rule under the header; no line ends in a space."""
        widths = [max(map(display_width, column)) for column in zip(self.headers, *self.cells, strict=True)]
        rule = "  ".join("─" * width for width in widths)
        lines = [self._line(self.headers, widths), rule, *(self._line(row, widths) for row in self.cells)]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """A GitHub-flavoured table; the characters that would break it are escaped."""
        marks = ["---:" if numeric else "---" for numeric in self.numeric]
        rows = [self.headers, marks, *self.cells]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = []
        for cell, width, numeric in zip(cells, widths, self.numeric, strict=True):
            space = " " * (width - display_width(cell))
            padded.append(space + cell if numeric else cell + space)
        return "  ".join(padded)


def display_width(text: str) -> int:
    """Terminal cells that ``text`` takes: wide characters two, combining marks none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def counts_table(rows: Sequence[Row]) -> Table:
    """The table of accuracy and size; ``of dense`` is active parameters over the dense network's."""
    dense = dense_row(rows)
    macs = fmt.column_unit([row.active_macs for row in rows])
    size = fmt.column_unit([row.active_bytes for row in rows], of_bytes=True)
    cells = tuple(
        (
            row.name,
            accuracy(row),
            fmt.integer(row.active_parameters),
            fmt.percent(ratio(row.active_parameters, dense.active_parameters) if dense else None),
            fmt.integer(row.stored_parameters),
            fmt.in_unit(row.active_macs, macs),
            fmt.in_unit(row.active_bytes, size),
            fmt.in_unit(row.stored_bytes, size),
        )
        for row in rows
    )
    headers = (
        "network",
        "accuracy",
        "active parameters",
        "of dense",
        "stored parameters",
        f"MACs ({macs[1]})" if macs[1] else "MACs",
        f"active {size[1]}",
        f"stored {size[1]}",
    )
    return Table(headers, cells, (False, *([True] * (len(headers) - 1))))


def accuracy(row: Row) -> str:
    if row.accuracy is None:
        return fmt.ABSENT
    if row.accuracy_sd is None:
        return fmt.percent(row.accuracy, 2)
    return f"{100 * row.accuracy:.2f} ± {100 * row.accuracy_sd:.2f} %"


def ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def dense_row(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row.role == "dense"), None)


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Exact numbers for machines, with the ratios that the text table shows."""
    dense = dense_row(rows)
    return [
        {
            **asdict(row),
            "active_to_dense": ratio(row.active_parameters, dense.active_parameters) if dense else None,
            "macs_to_dense": ratio(row.active_macs, dense.active_macs) if dense else None,
        }
        for row in rows
    ]
