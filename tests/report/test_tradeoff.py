"""Accuracy against bytes as a chart."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree

from sigmab_plugin.report import ReportData, Row
from sigmab_plugin.report.html import render
from sigmab_plugin.report.tradeoff import front, tradeoff_chart, tradeoff_section


def row(name: str, accuracy: float | None, active: int, stored: int) -> Row:
    return Row(name, "other", accuracy, 1, 1, 1, active, stored)


ROWS = [row("a <b>", 0.9, 4000, 4000), row("c", 0.8, 2000, 6000), row("d", 0.7, 3000, 3000)]


def test_front_by_hand() -> None:
    assert front([4000, 2000, 3000], [0.9, 0.8, 0.7]) == [1, 0]
    assert front([5, 5, 5], [0.1, 0.3, 0.2]) == [1]


def test_front_is_what_no_other_beats() -> None:
    generator = random.Random(0)
    for _ in range(100):
        sizes = [generator.randint(1, 5) for _ in range(7)]
        scores = [generator.randint(1, 5) / 5 for _ in range(7)]
        chosen = front(sizes, scores)
        for i in range(7):
            beaten = any(
                sizes[j] <= sizes[i]
                and scores[j] >= scores[i]
                and (sizes[j], scores[j]) != (sizes[i], scores[i])
                for j in range(7)
            )
            assert not (beaten and i in chosen)
            twin = any((sizes[j], scores[j]) == (sizes[i], scores[i]) for j in chosen)
            assert beaten or twin


def test_chart_is_valid_and_has_a_dot_per_network() -> None:
    chart = tradeoff_chart(ROWS, [r.active_bytes for r in ROWS], label="accuracy")
    root = ElementTree.fromstring(chart)
    assert len(root.findall(".//circle")) == 3
    assert [title.text for title in root.findall(".//title")] == ["a <b>", "c", "d"]
    assert len(root.find(".//polyline").attrib["points"].split()) == 2


def test_section_lists_the_measured_networks() -> None:
    section = tradeoff_section([*ROWS, row("unmeasured", None, 1, 1)])
    assert "a &lt;b&gt;" in section.html
    assert "unmeasured" not in section.html
    assert section.html.count("<svg") == 2
    assert "nothing to plot" in tradeoff_section([]).html


def test_a_comparison_shows_no_empty_parts() -> None:
    data = ReportData(title="many", rows=tuple(ROWS), sections=(tradeoff_section(ROWS),))
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", render(data))
    assert headings == [
        "Accuracy and size",
        "Accuracy against bytes",
        "What the numbers mean",
        "How it was made",
    ]
