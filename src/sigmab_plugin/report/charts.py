"""Charts as inline SVG: scatter of channels and line charts of training.

Drawn at about their size on a phone (360 wide), so that text is readable everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360
HEIGHT = 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 38


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are None are left out."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line for comparison."""

    name: str
    color: str
    y: float


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values (1, 2, 2.5, 5 times a power of ten) inside [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) + 0.0 for index in range(first, last + 1)]


def tick_label(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:g} %"
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.0e}"


class _Frame:
    """Axes, grid and the mapping from data to the drawing."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, width: int, height: int, percent: bool
    ) -> None:
        self.x, self.y, self.width, self.height, self.percent = x, y, width, height, percent

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return (
            _LEFT + across * (self.width - _LEFT - _RIGHT),
            self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM),
        )

    def axes(self, x_title: str, y_title: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
        parts = []
        right, bottom = self.width - _RIGHT, self.height - _BOTTOM
        for value in y_ticks:
            _, y = self.at(self.x[0], value)
            parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
            parts.append(
                f'<text class="soft" x="{_LEFT - 7}" y="{y + 4:.1f}" font-size="11.5" text-anchor="end">'
                f"{escape(tick_label(value, self.percent))}</text>"
            )
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="var(--line-strong)"/>'
        )
        for value in x_ticks:
            x, _ = self.at(value, self.y[0])
            parts.append(
                f'<text class="soft" x="{x:.1f}" y="{bottom + 16}" font-size="11.5" text-anchor="middle">'
                f"{escape(tick_label(value))}</text>"
            )
        middle = (_LEFT + right) / 2
        parts.append(
            f'<text class="faint" x="{middle:.0f}" y="{self.height - 5}" font-size="11.5" '
            f'text-anchor="middle">{escape(x_title)}</text>'
        )
        if y_title:
            centre = (_TOP + bottom) / 2
            parts.append(
                f'<text class="faint" transform="translate(11 {centre:.0f}) rotate(-90)" font-size="11.5" '
                f'text-anchor="middle">{escape(y_title)}</text>'
            )
        return parts


def _svg(parts: Sequence[str], label: str, width: int, height: int) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_title: str = "epoch",
    levels: Sequence[Level] = (),
    percent: bool = False,
    bounds: tuple[float, float] | None = None,
) -> str:
    """Lines over epochs. ``label`` is read by screen readers; "" if nothing can be drawn.

    ``bounds`` fixes the vertical range; otherwise it fits the data with a margin.
    """
    xs = [x for line in lines for x, y in zip(line.x, line.y, strict=True) if _drawn(y)]
    ys = [float(y) for line in lines for y in line.y if y is not None and math.isfinite(y)]
    if not ys:
        return ""
    ys += [level.y for level in levels]
    low, high = bounds or _margin(min(ys), max(ys), percent)
    span = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    frame = _Frame(span, (low, high), width=WIDTH, height=HEIGHT, percent=percent)
    x_ticks = [value for value in ticks(*span, 6) if float(value).is_integer()]
    parts = frame.axes(x_title, "", x_ticks, ticks(low, high))
    for level in levels:
        _, y = frame.at(span[0], level.y)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{level.color}" '
            'stroke-width="1.5" stroke-dasharray="5 4"/>'
        )
    for line in lines:
        spots = [
            frame.at(float(x), float(y))
            for x, y in zip(line.x, line.y, strict=True)
            if y is not None and math.isfinite(y)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        if len(spots) > 1:
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{line.color}" stroke-width="2" '
                'stroke-linejoin="round" stroke-linecap="round"/>'
            )
        if len(spots) <= 12:
            parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{line.color}"/>' for x, y in spots)
    return _svg(parts, label, WIDTH, HEIGHT)


def scatter(
    groups: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    *,
    label: str,
    x_title: str,
    y_title: str,
) -> str:
    """Square scatter with the diagonal drawn. ``groups``: (name, colour, points), later ones on top.

    A group is one path of zero-length strokes with round caps: a few bytes per point.
    """
    values = [value for _, _, points in groups for point in points for value in point if math.isfinite(value)]
    if not values:
        return ""
    low, high = _margin(min(values), max(values), False)
    if min(values) >= 0:
        low = max(low, -0.02 * high)
    size = WIDTH - 40
    frame = _Frame((low, high), (low, high), width=WIDTH, height=size, percent=False)
    marks = ticks(low, high, 5)
    parts = frame.axes(x_title, y_title, marks, marks)
    (x0, y0), (x1, y1) = frame.at(low, low), frame.at(high, high)
    parts.append(
        f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="var(--line-strong)" '
        'stroke-dasharray="4 4"/>'
    )
    many = sum(len(points) for _, _, points in groups) > 400
    for _, color, points in groups:
        spots = (frame.at(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in spots)
        if path:
            parts.append(
                f'<path d="{path}" stroke="{color}" stroke-width="{4 if many else 6.5}" '
                f'stroke-linecap="round" stroke-opacity="{0.6 if many else 0.8}" fill="none"/>'
            )
    return _svg(parts, label, WIDTH, size)


def _drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _margin(low: float, high: float, percent: bool) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    bottom, top = low - pad, high + pad
    if percent:
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    return bottom, top
