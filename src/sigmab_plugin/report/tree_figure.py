"""The tree as inline SVG, from the backbone down to the leaf heads.

Drawn twice by the page: wide, and compact for a phone. Edges are as thick as their share of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from . import format as fmt
from .analysis import prefix_share
from .data import TreeFigure, TreePart
from .style import leaf_color, leaf_tint


@dataclass(frozen=True)
class _Style:
    """Sizes in drawing units, about CSS pixels."""

    pitch: int  # distance between neighbouring leaves
    box: int
    row: int  # height of a specializer box
    gap: int  # vertical gap between rows
    font: float
    label: bool  # name modules of the dense model in the boxes


_WIDE = _Style(pitch=252, box=196, row=62, gap=46, font=14, label=True)
_COMPACT = _Style(pitch=84, box=77, row=56, gap=38, font=12, label=False)


def tree_svg(tree: TreeFigure, shares: Sequence[float] | None, *, compact: bool) -> str:
    """Draw ``tree``; ``shares`` are the leaf shares in order of ``tree.leaves``, or None."""
    return _Drawing(tree, shares, _COMPACT if compact else _WIDE).svg()


class _Drawing:
    def __init__(self, tree: TreeFigure, shares: Sequence[float] | None, style: _Style) -> None:
        self.tree, self.shares, self.style = tree, shares, style
        self.parts: dict[tuple[str, str], TreePart] = {(part.kind, part.path): part for part in tree.parts}
        self.out: list[str] = []
        self.depth = max((leaf.count("/") + 1 for leaf in tree.leaves), default=0)
        self.width = max(len(tree.leaves) * style.pitch, 3 * style.box)
        self.margin = (self.width - len(tree.leaves) * style.pitch) / 2

    def svg(self) -> str:
        style = self.style
        self._edges("")
        self._boxes("")
        shares = "" if self.shares is None else ", with the share of samples on every branch"
        label = f"Tree with {len(self.tree.leaves)} leaves: {', '.join(self.tree.leaves)}{shares}"
        return (
            f'<svg class="{"wide" if style.label else "narrow"}" width="{self.width}" height="{self._height():.0f}" '
            f'viewBox="0 0 {self.width} {self._height():.0f}" role="img" aria-label="{escape(label)}">'
            f"{''.join(self.out)}</svg>"
        )

    # Geometry

    def _height(self) -> float:
        return self._top("/".join("0" * self.depth)) + 2 * self.style.row + self.style.gap + 2

    def _top(self, path: str) -> float:
        """Top of a path's box: the backbone at 1, a specializer one router further down per level."""
        level = 0 if not path else path.count("/") + 1
        return 1 + level * (self.style.row + self._router_height() + 2 * self.style.gap - 14)

    def _router_height(self) -> int:
        return 32 if self.style.label else 36

    def _centre(self, path: str) -> float:
        """Middle of a path: of its leaves' span."""
        under = [i for i, leaf in enumerate(self.tree.leaves) if not path or leaf == path or leaf.startswith(path + "/")]
        return self.margin + self.style.pitch * ((under[0] + under[-1]) / 2 + 0.5)

    def _children(self, path: str) -> list[str]:
        return [child for child in (f"{path}/{i}".lstrip("/") for i in (0, 1)) if ("specializer", child) in self.parts]

    # Content

    def _color(self, path: str) -> tuple[str, str]:
        leaves = self.tree.leaves
        if path in leaves:
            index = leaves.index(path)
            return leaf_color(index, len(leaves)), leaf_tint(index, len(leaves))
        return "var(--line-strong)", "var(--sunken)"

    def _edges(self, path: str) -> None:
        style, children = self.style, self._children(path)
        x, bottom = self._centre(path), self._top(path) + style.row
        if not children:
            color, _ = self._color(path)
            self._line(x, bottom, x, bottom + style.gap - 14, color, self._thickness(path))
            return
        router = bottom + style.gap - 14
        self._line(x, bottom, x, router, "var(--line-strong)", self._thickness(path))
        for child in children:
            below, color = self._centre(child), self._color(child)[0]
            start, end = router + self._router_height(), self._top(child)
            middle = (start + end) / 2
            self.out.append(
                f'<path d="M{x:.1f} {start:.1f}C{x:.1f} {middle:.1f} {below:.1f} {middle:.1f} {below:.1f} {end:.1f}" '
                f'fill="none" stroke="{color}" stroke-width="{self._thickness(child):.1f}" stroke-opacity=".75"/>'
            )
            self._edges(child)

    def _boxes(self, path: str) -> None:
        style, children = self.style, self._children(path)
        x, top = self._centre(path), self._top(path)
        if path:
            name = self._named(path, self._level(path))
            self._box(x, top, name, self._details("specializer", path), *self._color(path))
            self._share(path, x, top)
        else:
            self._box(x, top, "backbone", self._details("backbone", ""), "var(--ink-faint)", "var(--sunken)")
        if children:
            self._router(path, x, top + style.row + style.gap - 14)
            for child in children:
                self._boxes(child)
            return
        title = f"head · {self.tree.head}" if style.label and self.tree.head else "head"
        head_top = top + style.row + style.gap - 14
        self._box(x, head_top, title, self._details("head", path), *self._color(path), share=self._share_text(path))

    def _level(self, path: str) -> str:
        position = path.count("/")
        return self.tree.levels[position] if position < len(self.tree.levels) else ""

    def _named(self, path: str, level: str) -> str:
        return f"{path} · {level}" if self.style.label and level else path

    def _details(self, kind: str, path: str) -> tuple[str, ...]:
        part = self.parts.get((kind, path))
        if part is None:
            return ()
        parameters = fmt.count(part.parameters)
        width = "" if part.width is None else f"{part.width} wide"
        if self.style.label:
            return (" · ".join(text for text in (width, f"{parameters} parameters") if text),)
        return tuple(text for text in (width, parameters) if text)

    def _share_text(self, path: str) -> str:
        if self.shares is None:
            return ""
        return fmt.percent(prefix_share(self.shares, self.tree.leaves, path))

    def _thickness(self, path: str) -> float:
        share = 0.0 if self.shares is None else prefix_share(self.shares, self.tree.leaves, path)
        return 2 + (16 if self.style.label else 10) * share

    # Marks

    def _line(self, x1: float, y1: float, x2: float, y2: float, color: str, thickness: float) -> None:
        self.out.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
            f'stroke-width="{thickness:.1f}" stroke-opacity=".75"/>'
        )

    def _text(self, x: float, y: float, text: str, *, size: float, bold: bool = False, soft: bool = False) -> None:
        weight = ' font-weight="650"' if bold else ""
        tone = ' class="soft"' if soft else ""
        self.out.append(
            f'<text{tone} x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="middle"{weight}>{escape(text)}</text>'
        )

    def _box(
        self, x: float, top: float, title: str, details: Sequence[str], color: str, tint: str, share: str = ""
    ) -> None:
        style = self.style
        self.out.append(
            f'<rect x="{x - style.box / 2:.1f}" y="{top:.1f}" width="{style.box}" height="{style.row}" rx="9" '
            f'fill="{tint}" stroke="{color}" stroke-width="1.5"/>'
        )
        lines = [title, *details]
        step = style.font + 4
        first = top + style.row / 2 - step * (len(lines) - 1) / 2 + style.font * 0.35
        for index, line in enumerate(lines):
            size = style.font if index == 0 else style.font - 1
            self._text(x, first + index * step, line, size=size, bold=index == 0, soft=index > 0)
        if share:
            self._text(x, top + style.row + style.font + 5, share, size=style.font, bold=True)

    def _router(self, path: str, x: float, top: float) -> None:
        part = self.parts.get(("router", path))
        height = self._router_height()
        half = 74 if self.style.label else 38
        self.out.append(
            f'<rect x="{x - half}" y="{top:.1f}" width="{2 * half}" height="{height}" rx="{height / 2:g}" '
            'fill="var(--surface)" stroke="var(--line-strong)" stroke-width="1.5"/>'
        )
        count = "" if part is None else fmt.count(part.parameters)
        if self.style.label:
            self._text(x, top + height / 2 + 4.5, f"router · {count}".rstrip(" ·"), size=13)
        else:
            self._text(x, top + 15, "router", size=11.5)
            self._text(x, top + 29, count, size=11, soft=True)

    def _share(self, path: str, x: float, top: float) -> None:
        """Share of samples beside the edge that enters a specializer; leaves carry theirs under the head."""
        if self.shares is None or path in self.tree.leaves:
            return
        text = self._share_text(path)
        width = 8.0 * len(text)
        self.out.append(
            f'<rect x="{x - width / 2 - 4:.1f}" y="{top - 22:.1f}" width="{width + 8:.1f}" height="18" rx="9" '
            'fill="var(--surface)" stroke="var(--line)"/>'
        )
        self._text(x, top - 9, text, size=12, bold=True)
