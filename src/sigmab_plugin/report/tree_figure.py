"""The tree as inline SVG, from the backbone down to the leaf heads.

Drawn twice by the page: wide, and compact for a phone. Edges are as thick as their share of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from . import format as fmt
from .analysis import is_under, prefix_share
from .data import TreeFigure
from .markup import tag
from .style import leaf_color, leaf_tint

#: Room for a tree on a wide page, in CSS pixels.
_ROOM = 1056


@dataclass(frozen=True)
class _Style:
    """Sizes in drawing units, about CSS pixels."""

    pitch: int  # distance between neighbouring leaves
    box: int
    row: int  # height of a box
    drop: int  # from a box down to its router or head
    router: int  # height of a router
    gap: int  # from a router down to its branches
    font: float
    named: bool  # boxes name modules of the dense model
    stacked: bool  # width and parameters on two lines


_WIDE = _Style(pitch=252, box=218, row=62, drop=32, router=32, gap=60, font=14, named=True, stacked=False)
_COMPACT = _Style(pitch=84, box=77, row=56, drop=24, router=36, gap=48, font=12, named=False, stacked=True)


def _style(leaves: int, *, compact: bool) -> _Style:
    """The compact style, or the widest that has room for all leaves side by side."""
    if compact:
        return _COMPACT
    if leaves * _WIDE.pitch <= _ROOM:
        return _WIDE
    pitch = max(_ROOM // leaves, _COMPACT.pitch)
    return replace(_COMPACT, pitch=pitch, box=pitch - 10, drop=28, gap=56, named=pitch >= 120)


def tree_svg(tree: TreeFigure, shares: Sequence[float] | None, *, compact: bool) -> str:
    """Draw ``tree``; ``shares`` are the leaf shares in order of ``tree.leaves``, or None."""
    return _Drawing(tree, shares, compact=compact).svg()


class _Drawing:
    def __init__(self, tree: TreeFigure, shares: Sequence[float] | None, *, compact: bool) -> None:
        self.tree, self.shares, self.compact = tree, shares, compact
        self.style = style = _style(len(tree.leaves), compact=compact)
        self.parts = {(part.kind, part.path): part for part in tree.parts}
        self.out: list[str] = []
        self.width = max(len(tree.leaves) * style.pitch, 3 * style.box)
        self.margin = (self.width - len(tree.leaves) * style.pitch) / 2
        self.height = 0.0

    def svg(self) -> str:
        self._edges("")
        self._boxes("")
        flow = "" if self.shares is None else ", with the share of samples on every branch"
        return tag(
            "svg",
            *self.out,
            cls="narrow" if self.compact else "wide",
            width=self.width,
            height=self.height,
            # A wide tree shrinks with the page as long as its text stays readable, then scrolls.
            style="max-width:none" if self.compact else f"min-width:{0.72 * self.width:.0f}px",
            viewBox=f"0 0 {self.width} {self.height:.0f}",
            role="img",
            aria_label=f"Tree with {len(self.tree.leaves)} leaves: {', '.join(self.tree.leaves)}{flow}",
        )

    # Geometry

    def _top(self, path: str) -> float:
        """Top of a path's box: the backbone at 1, a specializer one router further down per level."""
        level = path.count("/") + 1 if path else 0
        return 1 + level * (self.style.row + self.style.drop + self.style.router + self.style.gap)

    def _centre(self, path: str) -> float:
        """Middle of a path: of the leaves under it."""
        under = [index for index, leaf in enumerate(self.tree.leaves) if is_under(leaf, path)]
        return self.margin + self.style.pitch * ((under[0] + under[-1]) / 2 + 0.5)

    def _children(self, path: str) -> list[str]:
        paths = (f"{path}/{branch}".lstrip("/") for branch in (0, 1))
        return [child for child in paths if ("specializer", child) in self.parts]

    # Content

    def _color(self, path: str) -> tuple[str, str]:
        leaves = self.tree.leaves
        if path in leaves:
            index = leaves.index(path)
            return leaf_color(index, len(leaves)), leaf_tint(index, len(leaves))
        return "var(--line-strong)", "var(--sunken)"

    def _edges(self, path: str) -> None:
        """Lines under everything else."""
        style = self.style
        x, bottom = self._centre(path), self._top(path) + style.row
        color, _ = self._color(path)
        self._line(x, bottom, x, bottom + style.drop, color, path)
        start = bottom + style.drop + style.router
        for child in self._children(path):
            below, end = self._centre(child), self._top(child)
            middle = (start + end) / 2
            curve = (
                f"M{x:.1f} {start:.1f}C{x:.1f} {middle:.1f} {below:.1f} {middle:.1f} {below:.1f} {end:.1f}"
            )
            self._stroke("path", self._color(child)[0], child, d=curve, fill="none")
            self._edges(child)

    def _boxes(self, path: str) -> None:
        style, children = self.style, self._children(path)
        x, top = self._centre(path), self._top(path)
        if path:
            self._box(x, top, self._title(path), self._details("specializer", path), *self._color(path))
            self._share(path, x, top)
        else:
            details = self._details("backbone", "")
            self._box(x, top, "backbone", details, "var(--ink-faint)", "var(--sunken)")
        below = top + style.row + style.drop
        if children:
            self._router(path, x, below)
            for child in children:
                self._boxes(child)
            return
        title = f"head · {self.tree.head}" if style.named and self.tree.head else "head"
        self._box(x, below, title, self._details("head", path), *self._color(path))
        bottom = below + style.row + 2
        if self.shares is not None:
            bottom += style.font + 3
            self._text(x, bottom, self._share_text(path), size=style.font, bold=True)
            bottom += 5
        self.height = max(self.height, bottom)

    def _title(self, path: str) -> str:
        """The path, and in the wide drawing the dense module that this level was cut from."""
        position = path.count("/")
        level = self.tree.levels[position] if position < len(self.tree.levels) else ""
        return f"{path} · {level}" if self.style.named and level else path

    def _details(self, kind: str, path: str) -> tuple[str, ...]:
        part = self.parts.get((kind, path))
        if part is None:
            return ()
        width = "" if part.width is None else f"{part.width} wide"
        parameters = fmt.count(part.parameters)
        if self.style.stacked:
            return tuple(text for text in (width, parameters) if text)
        return (" · ".join(text for text in (width, f"{parameters} parameters") if text),)

    def _share_text(self, path: str) -> str:
        return fmt.percent(prefix_share(self.shares or (), self.tree.leaves, path))

    # Marks

    def _stroke(self, shape: str, color: str, path: str, **place: str | float) -> None:
        share = 0.0 if self.shares is None else prefix_share(self.shares, self.tree.leaves, path)
        thickness = 2 + (10 if self.style.stacked else 16) * share
        self.out.append(tag(shape, stroke=color, stroke_width=thickness, stroke_opacity=".75", **place))

    def _line(self, x1: float, y1: float, x2: float, y2: float, color: str, path: str) -> None:
        self._stroke("line", color, path, x1=x1, y1=y1, x2=x2, y2=y2)

    def _text(
        self, x: float, y: float, text: str, *, size: float, bold: bool = False, soft: bool = False
    ) -> None:
        self.out.append(
            tag(
                "text",
                escape(text),
                cls="soft" if soft else None,
                x=x,
                y=y,
                font_size=size,
                font_weight="650" if bold else None,
                text_anchor="middle",
            )
        )

    def _box(self, x: float, top: float, title: str, details: Sequence[str], color: str, tint: str) -> None:
        style = self.style
        self._pill(x, top, style.box, style.row, 9, color, tint)
        lines = [title, *details]
        step = style.font + 4
        first = top + style.row / 2 - step * (len(lines) - 1) / 2 + style.font * 0.35
        for index, line in enumerate(lines):
            size = style.font if index == 0 else style.font - 1 if style.stacked else style.font - 1.5
            self._text(x, first + index * step, line, size=size, bold=index == 0, soft=index > 0)

    def _pill(
        self, x: float, top: float, width: float, height: float, radius: float, color: str, fill: str
    ) -> None:
        box = {"x": x - width / 2, "y": top, "width": width, "height": height, "rx": radius}
        self.out.append(tag("rect", fill=fill, stroke=color, stroke_width=1.5, **box))

    def _router(self, path: str, x: float, top: float) -> None:
        part, height = self.parts.get(("router", path)), self.style.router
        count = "" if part is None else fmt.count(part.parameters)
        width = 76 if self.style.stacked else 148
        self._pill(x, top, width, height, height / 2, "var(--line-strong)", "var(--surface)")
        if self.style.stacked:
            self._text(x, top + 15, "router", size=11.5)
            self._text(x, top + 29, count, size=11, soft=True)
        else:
            self._text(x, top + height / 2 + 4.5, f"router · {count}".rstrip(" ·"), size=13)

    def _share(self, path: str, x: float, top: float) -> None:
        """Share of samples on the edge into a specializer; leaves carry theirs under the head."""
        if self.shares is None or path in self.tree.leaves:
            return
        text = self._share_text(path)
        self._pill(x, top - 23, 8 * len(text) + 8, 18, 9, "var(--line)", "var(--surface)")
        self._text(x, top - 10, text, size=12, bold=True)
