"""The report page: one self-contained HTML file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from ..errors import ConfigError
from ..tuning.checkpoint import write_atomically
from . import format as fmt
from .data import ReportData, Row, Section
from .markup import empty, scroll_box, tag
from .sections import channels, curves, leaves, origin, terms, tree
from .style import style_sheet
from .tables import accuracy, counts_table, ratio

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

    Each file is written under a temporary name and renamed, so that a page is never half there. Characters that
    UTF-8 cannot hold (of file names that are not UTF-8) are written as escapes.

    Returns:
        Paths of the page and of the JSON.

    Raises:
        ConfigError: as :func:`check_report_path`.
    """
    page, record = check_report_path(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(record, (text + "\n").encode(errors="backslashreplace"))
    write_atomically(page, render(data).encode(errors="backslashreplace"))
    return page, record


def check_report_path(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Paths of the page and of the JSON that :func:`write_report` would write; nothing is written.

    For callers that measure for long before they write.

    Raises:
        ConfigError: ``path`` does not end in ``.html`` or ``.htm``, or a JSON file that is no report has the
            name of the report's own.
    """
    page = Path(path)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"a report is an HTML page: give a name that ends in .html; got {page}")
    record = page.with_suffix(".json")
    if record.exists() and not _is_report(record):
        raise ConfigError(
            f"the report's numbers would replace {record}, which is not a report; give the page another name"
        )
    return page, record


def _is_report(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == "sigmab-report"


def render(data: ReportData) -> str:
    """The page as one string."""
    sections = [*_parts(data), Section("How it was made", origin(data))]
    anchors = _anchors([section.title for section in sections])
    links, bodies = [], []
    for anchor, section in zip(anchors, sections, strict=True):
        title = escape(section.title)
        links.append(tag("li", tag("a", title, href=f"#{anchor}")))
        heading = tag("h2", title, id=f"{anchor}-title")
        bodies.append(tag("section", heading, section.html, id=anchor, aria_labelledby=f"{anchor}-title"))
    facts = [tag("div", tag("dt", escape(key)), tag("dd", escape(text))) for key, text in data.facts.items()]
    masthead = tag(
        "div",
        tag("p", "SigmaB report", cls="eyebrow"),
        tag("h1", escape(data.title)),
        tag("p", escape(data.summary), cls="lede") if data.summary else "",
        tag("dl", *facts, cls="facts") if facts else "",
        tag("nav", tag("ul", *links), aria_label="Sections"),
        cls="masthead-inner",
    )
    newline = "\n"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{escape(data.title)} · SigmaB report</title>
<style>
{style_sheet()}</style>
</head>
<body>
{tag("header", masthead, cls="masthead")}
<main>
{_headline(data.rows)}
{newline.join(bodies)}
</main>
<footer>Made by sigmab-plugin. The numbers of this page stand in the JSON file beside it.</footer>
</body>
</html>
"""
    # A number and its unit stay on one line.
    return re.sub(r"(?<=\d) (?=%|pp\b)", "\u00a0", page)


def _parts(data: ReportData) -> list[Section]:
    """The built-in parts, then the caller's. A comparison of many networks has no one tree to show."""
    parts = [Section(title, body(data)) for title, body in PARTS]
    if data.sections and not (data.tree or data.leaves or data.channels or data.curves):
        return [parts[0], *data.sections, parts[-1]]
    return [*parts, *data.sections]


def _headline(rows: Sequence[Row]) -> str:
    """Four figures on top: what SigmaB costs and gives against the dense network and the static twin."""
    dense, tree_row, twin = (_row(rows, role) for role in ("dense", "sigmab", "twin"))
    if dense is None or tree_row is None:
        return ""
    gains = []
    for other, name in ((dense, "dense"), (twin, "static twin")):
        if other is not None and tree_row.accuracy is not None and other.accuracy is not None:
            gains.append(f"{fmt.points(tree_row.accuracy - other.accuracy)} against {name}")
    label = escape(f"Accuracy of {tree_row.name}") if _several_trees(rows) else "Accuracy"
    cards = [_stat(label, fmt.percent(tree_row.accuracy), *(gains or ["not measured"]))]
    for label, part, whole in (
        ("Active parameters", tree_row.active_parameters, dense.active_parameters),
        ("MACs per sample", tree_row.active_macs, dense.active_macs),
        ("Stored parameters", tree_row.stored_parameters, dense.stored_parameters),
    ):
        counts = [fmt.count(value).replace(" ", "\u00a0") for value in (part, whole)]
        cards.append(_stat(label, fmt.percent(ratio(part, whole)), f"{counts[0]} against {counts[1]} dense"))
    return tag("div", *cards, cls="stats")


def _stat(label: str, value: str, *more: str) -> str:
    number, _, unit = value.partition(" ")
    shown = escape(number) + (tag("span", f" {escape(unit)}", cls="unit") if unit else "")
    return tag(
        "div",
        tag("div", label, cls="label"),
        tag("div", shown, cls="value"),
        *(tag("div", escape(line), cls="more") for line in more),
        cls="card stat",
    )


def _several_trees(rows: Sequence[Row]) -> bool:
    return sum(row.role == "sigmab" for row in rows) > 1


def _row(rows: Sequence[Row], role: str) -> Row | None:
    return next((row for row in rows if row.role == role), None)


def _figures(data: ReportData) -> str:
    if not data.rows:
        return empty("No network was measured.")
    table = counts_table(data.rows)
    head = [
        tag("th", escape(header), scope="col", cls="n" if numeric else None)
        for header, numeric in zip(table.headers, table.numeric, strict=True)
    ]
    body = []
    for row, cells in zip(data.rows, table.cells, strict=True):
        key = tag("span", cls="key", style=f"background:var(--{row.role})")
        figures = [tag("td", escape(cell), cls="n") for cell in cells[1:]]
        body.append(tag("tr", tag("th", key, escape(cells[0]), scope="row"), *figures, cls=row.role))
    about = (
        "Active is what one input reads: for the tree its largest path, routers included. The static twin is one "
        "path of the same shape, trained the same way: it shows what routing itself adds."
    )
    box = scroll_box("Accuracy and size", tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body)))
    verdict = _verdict(data.rows)
    return (
        tag("p", about, cls="about")
        + tag("div", box, cls="card flush")
        + (tag("p", escape(verdict), cls="aside") if verdict else "")
    )


def _verdict(rows: Sequence[Row]) -> str:
    """One sentence that compares the tree with its twin, whichever is better."""
    tree_row, twin = _row(rows, "sigmab"), _row(rows, "twin")
    if tree_row is None:
        return ""
    if twin is None:
        return "No static twin was trained, so this table cannot tell what routing itself adds."
    if tree_row.accuracy is None or twin.accuracy is None:
        return ""
    gain = tree_row.accuracy - twin.accuracy
    where = "level with" if not gain else f"{abs(100 * gain):.2f} pp {'above' if gain > 0 else 'below'}"
    times = ratio(tree_row.stored_parameters, twin.stored_parameters) or 0.0
    subject = tree_row.name if _several_trees(rows) else "The tree"
    return (
        f"{subject} ({accuracy(tree_row)}) is {where} its static twin ({accuracy(twin)}) and stores {times:.2f} "
        "times as many parameters."
    )


def _anchors(titles: Sequence[str]) -> list[str]:
    """A distinct identifier per title."""
    anchors: list[str] = []
    for title in titles:
        stem = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "part"
        anchor, number = stem, 2
        while anchor in anchors:
            anchor, number = f"{stem}-{number}", number + 1
        anchors.append(anchor)
    return anchors
