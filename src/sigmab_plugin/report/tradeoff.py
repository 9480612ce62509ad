"""Accuracy against bytes: one numbered dot per network, and the line of those that no other beats."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from . import charts
from . import format as fmt
from .data import Row, Section
from .markup import empty, tag

HEIGHT = 300


def tradeoff_section(rows: Sequence[Row]) -> Section:
    """Two charts: accuracy against the bytes that one input reads, and against all that are stored."""
    measured = [row for row in rows if row.accuracy is not None]
    if not measured:
        return Section(
            "Accuracy against bytes", empty("No network was evaluated, so there is nothing to plot.")
        )
    figures = []
    for title, sizes in (
        ("Active bytes: read for one input", [row.active_bytes for row in measured]),
        ("Stored bytes: the whole network", [row.stored_bytes for row in measured]),
    ):
        chart = tradeoff_chart(measured, sizes, label=f"Accuracy against {title.partition(':')[0].lower()}")
        figures.append(tag("div", tag("h3", escape(title)), chart, cls="card"))
    names = tag(
        "ol",
        *(
            tag("li", tag("span", cls="key", style=f"background:var(--{row.role})"), escape(f" {row.name}"))
            for row in measured
        ),
    )
    about = (
        "Each number is a network of the list. The line joins those that no other network beats: none is at least as "
        "accurate with fewer bytes. Up and to the left is better."
    )
    body = tag("p", about, cls="about") + tag("div", *figures, tag("div", names, cls="card"), cls="grid top")
    return Section("Accuracy against bytes", body)


def front(sizes: Sequence[int], accuracies: Sequence[float]) -> list[int]:
    """Indices that are not beaten, by rising size: fewer bytes at the same accuracy or more wins."""
    chosen: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i], -accuracies[i])):
        if not chosen or accuracies[index] > accuracies[chosen[-1]]:
            chosen.append(index)
    return chosen


def tradeoff_chart(rows: Sequence[Row], sizes: Sequence[int], *, label: str) -> str:
    """SVG with a dot per row, numbered from 1."""
    accuracies = [float(row.accuracy or 0.0) for row in rows]
    factor, unit = fmt.column_unit(list(sizes), of_bytes=True)
    xs = [size / factor for size in sizes]
    low, high = charts._with_margin(min(accuracies), max(accuracies), percent=True)
    across = (0.0, 1.06 * max(xs))
    frame = charts._Frame(across, (low, high), HEIGHT, True)
    parts = frame.axes(unit, "", charts.ticks(*across, 5), charts.ticks(low, high))
    steps = " ".join(
        "{:.1f},{:.1f}".format(*frame.at(xs[i], accuracies[i])) for i in front(sizes, accuracies)
    )
    parts.append(
        tag("polyline", points=steps, fill="none", stroke="var(--line-strong)", stroke_width=1.5,
            stroke_dasharray="4 3")
    )  # fmt: skip
    for number, (row, x, y) in enumerate(zip(rows, xs, accuracies, strict=True), start=1):
        across_at, down_at = frame.at(x, y)
        dot = tag("circle", cx=across_at, cy=down_at, r=8, fill=f"var(--{row.role})", fill_opacity=".9")
        text = tag(
            "text", str(number), x=across_at, y=down_at + 3.6, text_anchor="middle", font_size=10,
            style="fill:var(--surface);font-weight:600",
        )  # fmt: skip
        parts.append(tag("g", tag("title", escape(row.name)), dot, text))
    return charts._svg(parts, label, HEIGHT)
