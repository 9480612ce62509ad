"""The report page: one self-contained HTML file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from . import format as fmt
from .data import ReportData, Row, Section
from .sections import channels, curves, leaves, origin, terms, tree
from .style import CSS
from .tables import accuracy, counts_table, dense_row, ratio

#: Built-in parts in page order: title -> body. A part without data says how to get it.
PARTS: tuple[tuple[str, Callable[[ReportData], str]], ...] = (
    ("Accuracy and size", lambda data: _figures(data)),
    ("The tree", tree),
    ("Where samples go", leaves),
    ("Channels", channels),
    ("Fine-tuning", curves),
    ("What the numbers mean", terms),
)


def write_report(path: str | os.PathLike[str], data: ReportData) -> tuple[Path, Path]:
    """Write the page to ``path`` and its data beside it with the suffix ``.json``.

    Each file is written under a temporary name and renamed, so that a page is never half there.

    Returns:
        Paths of the page and of the JSON.
    """
    page = Path(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    record = page.with_suffix(".json")
    _replace(record, json.dumps(data.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _replace(page, render(data))
    return page, record


def render(data: ReportData) -> str:
    """The page as one string."""
    sections = [Section(title, body(data)) for title, body in PARTS]
    sections += [*data.sections, Section("How it was made", origin(data))]
    taken: set[str] = set()
    anchors = [_anchor(section.title, taken) for section in sections]
    links = "".join(
        f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    bodies = "\n".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">{escape(section.title)}</h2>\n'
        f"{section.html}\n</section>"
        for anchor, section in zip(anchors, sections, strict=True)
    )
    facts = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in data.facts.items()
    )
    lede = f'<p class="lede">{escape(data.summary)}</p>' if data.summary else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(data.title)} · SigmaB report</title>
<style>{CSS}</style>
</head>
<body>
<header class="masthead"><div class="masthead-inner">
<p class="eyebrow">SigmaB report</p>
<h1>{escape(data.title)}</h1>
{lede}
{f'<dl class="facts">{facts}</dl>' if facts else ""}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</div></header>
<main>
{_stats(data.rows)}
{bodies}
</main>
<footer>Made by sigmab-plugin. The numbers of this page stand in the JSON file beside it.</footer>
</body>
</html>
"""


def _stats(rows: Sequence[Row]) -> str:
    """Four figures on top: what SigmaB costs and gives against the dense network and the static twin."""
    dense = dense_row(rows)
    tree_row = next((row for row in rows if row.role == "sigmab"), None)
    twin = next((row for row in rows if row.role == "twin"), None)
    if dense is None or tree_row is None:
        return ""
    gains = []
    if tree_row.accuracy is not None:
        for other, name in ((dense, "dense"), (twin, "static twin")):
            if other is not None and other.accuracy is not None:
                gains.append(f"{fmt.points(tree_row.accuracy - other.accuracy)} against {name}")
    cards = [
        ("Accuracy", fmt.percent(tree_row.accuracy), "; ".join(gains) or "not measured"),
        (
            "Active parameters",
            fmt.percent(ratio(tree_row.active_parameters, dense.active_parameters)),
            f"{fmt.count(tree_row.active_parameters)} of the dense {fmt.count(dense.active_parameters)}",
        ),
        (
            "MACs per sample",
            fmt.percent(ratio(tree_row.active_macs, dense.active_macs)),
            f"{fmt.count(tree_row.active_macs)} of the dense {fmt.count(dense.active_macs)}",
        ),
        (
            "Stored parameters",
            fmt.percent(ratio(tree_row.stored_parameters, dense.stored_parameters)),
            f"{fmt.count(tree_row.stored_parameters)} of the dense {fmt.count(dense.stored_parameters)}",
        ),
    ]
    return (
        '<div class="stats">'
        + "".join(
            f'<div class="card stat"><div class="label">{label}</div><div class="value">{_unit(value)}</div>'
            f'<div class="more">{escape(more)}</div></div>'
            for label, value, more in cards
        )
        + "</div>"
    )


def _unit(value: str) -> str:
    number, _, unit = value.partition(" ")
    return f'{escape(number)}<span class="unit"> {escape(unit)}</span>' if unit else escape(number)


def _figures(data: ReportData) -> str:
    if not data.rows:
        return '<p class="empty">No network was measured. Add rows with sigmab_plugin.report.counts.</p>'
    table = counts_table(data.rows)
    head = "".join(
        f'<th scope="col"{_numeric(numeric)}>{escape(header)}</th>'
        for header, numeric in zip(table.headers, table.numeric, strict=True)
    )
    body = ""
    for row, cells in zip(data.rows, table.cells, strict=True):
        figures = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells[1:])
        key = f'<span class="key" style="background:var(--{row.role})"></span>'
        body += f'<tr class="{row.role}"><th scope="row">{key}{escape(cells[0])}</th>{figures}</tr>'
    return (
        '<p class="about">Active is what one input reads: for the tree its largest path, routers included. '
        "The static twin is one path of the same shape, trained the same way: it shows what routing itself adds.</p>"
        f'<div class="card flush"><div class="scroll" tabindex="0" role="region" aria-label="Accuracy and size"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>{_verdict(data.rows)}"
    )


def _numeric(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _verdict(rows: Sequence[Row]) -> str:
    """One sentence that compares the tree with its twin, in either direction."""
    tree_row = next((row for row in rows if row.role == "sigmab"), None)
    twin = next((row for row in rows if row.role == "twin"), None)
    if tree_row is None:
        return ""
    if twin is None:
        return '<p class="aside">No static twin was trained, so this table cannot tell what routing itself adds.</p>'
    if tree_row.accuracy is None or twin.accuracy is None:
        return ""
    gain = tree_row.accuracy - twin.accuracy
    word = "above" if gain > 0 else "below" if gain < 0 else "level with"
    by = f"{fmt.points(abs(gain), 2).lstrip('+')} {word}" if gain else word
    more = ratio(tree_row.stored_parameters, twin.stored_parameters) or 0.0
    return (
        f'<p class="aside">The tree ({escape(accuracy(tree_row))}) is {by} its static twin '
        f"({escape(accuracy(twin))}) and stores {more:.2f} times as many parameters as the twin does.</p>"
    )


def _anchor(title: str, taken: set[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
    anchor, number = stem, 2
    while anchor in taken:
        anchor, number = f"{stem}-{number}", number + 1
    taken.add(anchor)
    return anchor


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
