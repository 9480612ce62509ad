"""The figure of the accuracy benchmark: test accuracy of every headline, all its runs, and the dense network.

Written as text, so that it can be compared with what the result files give.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from .tables import Result, experiments, headlines, spread
from .titles import TITLES

WIDTH, LABELS, VALUES = 1040, 550, 160  # of all, of the names on the left, of the figures on the right
ROW, PANEL, MARGIN = 22, 74, 14  # heights of a row and of what a panel has beside its rows; the space around
COLOURS = {"tree": "#1f6fb4", "twin": "#d9731a", "wide_twin": "#a14f0e", "torch_pruning": "#3b8a3e"}
LEGEND = {
    "tree": "SigmaB",
    "twin": "static twin",
    "wide_twin": "widened twin",
    "torch_pruning": "Torch-Pruning",
}


def accuracy_figure(results: Path) -> str:
    """SVG: one panel for each experiment; a dot is the mean, faint dots single runs, the bar one standard deviation."""
    panels: list[str] = []
    top = MARGIN + ROW
    for folder in experiments(results):
        found = headlines(folder)
        dense = found.pop("dense")[0]
        panels += _panel(folder.name, dense, list(found.values()), top)
        top += PANEL + ROW * len(found)
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
            'aria-label="Test accuracy of trees, static twins and pruned networks" '
            'font-family="system-ui, sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
            *_legend(),
            *panels,
            "</svg>",
            "",
        ]
    )


def _legend() -> list[str]:
    parts = []
    for number, (kind, name) in enumerate(LEGEND.items()):
        x = LABELS + 6 + 125 * number
        parts.append(_dot(x, MARGIN, kind))
        parts.append(_text(x + 10, MARGIN, name))
    return parts


def _panel(name: str, dense: Result, rows: Sequence[list[Result]], top: int) -> list[str]:
    """Title, axis, dense network as a line, and the rows."""
    values = [run["test"]["accuracy"] for runs in [[dense], *rows] for run in runs]
    low, high = math.floor(min(values)), math.ceil(max(values) + 0.25)
    left, right = LABELS, WIDTH - VALUES

    def place(value: float) -> float:
        return left + (right - left) * (value - low) / (high - low)

    bottom = top + 34 + ROW * len(rows)
    parts = [_text(MARGIN, top + 12, f"{name}, test accuracy %", weight="bold")]
    for tick in range(low, high + 1, max(1, (high - low) // 6)):
        x = place(tick)
        parts.append(f'<path d="M{x:.1f} {top + 26}V{bottom}" stroke="#e3e3e3"/>')
        parts.append(_text(x, bottom + 12, str(tick), anchor="middle", fill="#666666"))
    x, value = place(dense["test"]["accuracy"]), dense["test"]["accuracy"]
    parts.append(f'<path d="M{x:.1f} {top + 26}V{bottom}" stroke="#444444" stroke-dasharray="4 3"/>')
    parts.append(_text(x, top + 14, f"dense {value:.2f}", anchor="middle", fill="#444444"))
    for number, runs in enumerate(rows):
        parts += _row(runs, top + 38 + ROW * number, place)
    return parts


def _row(runs: list[Result], y: int, place: Callable[[float], float]) -> list[str]:
    arm = runs[0]["arm"]
    kind = runs[0]["recipe"]["arms"][arm]["kind"]
    values = [run["test"]["accuracy"] for run in runs]
    mean = statistics.fmean(values)
    epochs = f"{runs[0]['epochs']} epochs" if runs[0]["epochs"] else "untrained"
    parts = [_text(MARGIN, y, TITLES.get(arm, arm).removesuffix(f", {epochs}"))]
    parts.append(_text(LABELS - 16, y, epochs, anchor="end", fill="#666666"))
    if len(values) > 1:
        deviation = statistics.stdev(values)
        ends = (place(mean - deviation), place(mean + deviation))
        parts.append(
            f'<path d="M{ends[0]:.1f} {y}H{ends[1]:.1f}" stroke="{COLOURS[kind]}" stroke-width="2"/>'
        )
        parts += [_dot(place(value), y, kind, faint=True) for value in values]
    parts.append(_dot(place(mean), y, kind))
    runs_text = "1 run" if len(values) == 1 else f"{len(values)} runs"
    parts.append(_text(WIDTH - VALUES + 12, y, spread(values)))
    parts.append(_text(WIDTH - MARGIN, y, runs_text, anchor="end", fill="#666666"))
    return parts


def _dot(x: float, y: float, kind: str, *, faint: bool = False) -> str:
    look = 'r="3" fill-opacity="0.35"' if faint else 'r="5"'
    return f'<circle cx="{x:.1f}" cy="{y}" {look} fill="{COLOURS[kind]}"/>'


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", fill: str = "#222222", weight: str = "normal"
) -> str:
    """Text whose middle line is at ``y``."""
    look = f'text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y + 4:.1f}" {look}>{escape(words)}</text>'
