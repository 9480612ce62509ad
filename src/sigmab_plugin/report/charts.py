"""Charts as inline SVG: scatter of channels and line charts of training.

Drawn at about their size on a phone (360 wide), so that text is readable everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .markup import tag

WIDTH = 360
HEIGHT = 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 38
_FONT = 11.5


@dataclass(frozen=True)
class Line:
    """One line of a chart; points that are None are left out."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float | None]

    def points(self) -> Iterator[tuple[float, float]]:
        for x, y in zip(self.x, self.y, strict=True):
            if y is not None and math.isfinite(y):
                yield float(x), float(y)


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line for comparison."""

    name: str
    color: str
    y: float


@dataclass(frozen=True)
class Cloud:
    """One kind of dots of a scatter; those with a coordinate that is None are left out."""

    color: str
    points: Sequence[tuple[float | None, float | None]]

    def finite(self) -> Iterator[tuple[float, float]]:
        for x, y in self.points:
            if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
                yield x, y


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


def tick_label(value: float, *, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:g} %"
    return f"{value:.3g}" if abs(value) < 1e5 else f"{value:.0e}"


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
    drawn = [point for line in lines for point in line.points()]
    if not drawn:
        return ""
    xs = [x for x, _ in drawn]
    ys = [y for _, y in drawn] + [level.y for level in levels]
    low, high = bounds or _with_margin(min(ys), max(ys), percent=percent)
    across = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    frame = _Frame(across, (low, high), HEIGHT, percent)
    whole = [value for value in ticks(*across, 6) if float(value).is_integer()]
    parts = frame.axes(x_title, "", whole, ticks(low, high))
    for level in levels:
        _, y = frame.at(across[0], level.y)
        parts.append(
            tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, stroke=level.color, stroke_width=1.5,
                stroke_dasharray="5 4")
        )  # fmt: skip
    for line in lines:
        spots = [frame.at(x, y) for x, y in line.points()]
        if len(spots) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
            parts.append(
                tag("polyline", points=path, fill="none", stroke=line.color, stroke_width=2,
                    stroke_linejoin="round", stroke_linecap="round")
            )  # fmt: skip
        if len(spots) <= 12:
            parts.extend(tag("circle", cx=x, cy=y, r=2.6, fill=line.color) for x, y in spots)
    return _svg(parts, label, HEIGHT)


def scatter(clouds: Sequence[Cloud], *, label: str, x_title: str, y_title: str) -> str:
    """Square scatter with its diagonal; later clouds lie on top. "" if there is no finite point.

    A cloud is one path of zero-length strokes with round caps: a few bytes per dot.
    """
    finite = [(cloud.color, list(cloud.finite())) for cloud in clouds]
    values = [value for _, points in finite for point in points for value in point]
    if not values:
        return ""
    low, high = _with_margin(min(values), max(values))
    if min(values) >= 0:
        low = max(low, -0.02 * high)
    height = WIDTH - 40
    frame = _Frame((low, high), (low, high), height, False)
    marks = ticks(low, high, 5)
    parts = frame.axes(x_title, y_title, marks, marks)
    (x1, y1), (x2, y2) = frame.at(low, low), frame.at(high, high)
    diagonal = tag("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke="var(--line-strong)", stroke_dasharray="4 4")
    parts.append(diagonal)
    many = sum(len(points) for _, points in finite) > 400
    for color, points in finite:
        if points:
            path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in (frame.at(*point) for point in points))
            parts.append(
                tag("path", d=path, fill="none", stroke=color, stroke_width=4 if many else 6.5,
                    stroke_linecap="round", stroke_opacity=".6" if many else ".8")
            )  # fmt: skip
    return _svg(parts, label, height)


@dataclass(frozen=True)
class _Frame:
    """Axes, grid and the mapping from data to the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int
    percent: bool

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            self.height - _BOTTOM - up * (self.height - _TOP - _BOTTOM),
        )

    def axes(
        self, x_title: str, y_title: str, x_ticks: Sequence[float], y_ticks: Sequence[float]
    ) -> list[str]:
        parts = []
        right, bottom = WIDTH - _RIGHT, self.height - _BOTTOM
        for value in y_ticks:
            _, y = self.at(self.x[0], value)
            parts.append(tag("line", x1=_LEFT, x2=right, y1=y, y2=y, stroke="var(--line)"))
            parts.append(
                _label(tick_label(value, percent=self.percent), x=_LEFT - 7, y=y + 4, text_anchor="end")
            )
        parts.append(tag("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, stroke="var(--line-strong)"))
        for value in x_ticks:
            x, _ = self.at(value, self.y[0])
            parts.append(_label(tick_label(value), x=x, y=bottom + 16))
        parts.append(_label(x_title, "faint", x=(_LEFT + right) / 2, y=self.height - 5))
        if y_title:
            turned = f"translate(11 {(_TOP + bottom) / 2:.0f}) rotate(-90)"
            parts.append(_label(y_title, "faint", transform=turned))
        return parts


def _label(text: str, tone: str = "soft", *, text_anchor: str = "middle", **place: str | float) -> str:
    return tag("text", escape(text), cls=tone, font_size=_FONT, text_anchor=text_anchor, **place)


def _svg(parts: Sequence[str], label: str, height: int) -> str:
    return tag("svg", *parts, cls="chart", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def _with_margin(low: float, high: float, *, percent: bool = False) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    bottom, top = low - pad, high + pad
    return (max(bottom, 0.0), min(top, 1.0)) if percent else (bottom, top)
