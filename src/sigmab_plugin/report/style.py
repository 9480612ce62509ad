"""The page's style sheet, and the colours that depend on the tree."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def style_sheet() -> str:
    """Contents of ``style.css`` beside this module."""
    return files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def leaf_color(index: int, leaves: int) -> str:
    """Colour of a leaf: cool hues under branch 0, warm ones under branch 1, so that kinship shows."""
    return f"hsl({_hue(index, leaves)} var(--leaf-s) var(--leaf-l))"


def leaf_tint(index: int, leaves: int) -> str:
    """The same hue, pale: a background behind text."""
    return f"hsl({_hue(index, leaves)} var(--leaf-soft-s) var(--leaf-soft-l))"


def _hue(index: int, leaves: int) -> int:
    half = (leaves + 1) // 2
    if index < half:
        return round(222 - 62 * index / max(half - 1, 1))
    return round(335 + 55 * (index - half) / max(leaves - half - 1, 1)) % 360
