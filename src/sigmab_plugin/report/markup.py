"""Elements of HTML and SVG as strings."""

from __future__ import annotations

from html import escape

#: Elements that SVG closes in their own tag; in HTML a bare ``<div/>`` would stay open.
_SHAPES = frozenset({"circle", "line", "path", "polyline", "rect"})


def tag(name: str, /, *content: str, **attributes: str | float | None) -> str:
    """One element. ``content`` is markup already; attribute values are escaped, None leaves one out.

    ``cls`` stands for ``class``, underscores for hyphens. Numbers lose needless digits.
    """
    head = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        shown = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
        head.append(f'{"class" if key == "cls" else key.replace("_", "-")}="{escape(shown)}"')
    opening = " ".join(head)
    if name in _SHAPES and not content:
        return f"<{opening}/>"
    return f"<{opening}>{''.join(content)}</{name}>"


def scroll_box(label: str, *content: str) -> str:
    """Wide content in a box of its own, which the keyboard can reach and scroll."""
    return tag("div", *content, cls="scroll", tabindex="0", role="region", aria_label=label)


def empty(markup: str) -> str:
    """What stands where data is missing: it says how to get it."""
    return tag("p", markup, cls="empty")


def legend(entries: list[tuple[str, str, bool]]) -> str:
    """Key of a chart: (name, colour, dashed)."""
    items = []
    for name, color, dashed in entries:
        mark = (
            tag("i", cls="key dash", style=f"border-color:{color}")
            if dashed
            else tag("i", cls="key", style=f"background:{color}")
        )
        items.append(tag("span", mark, escape(name)))
    return tag("div", *items, cls="legend")
