from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sigmab_plugin.errors import ConfigError, FormatError
from sigmab_plugin.report import Curve, ReportData, render, write_report
from sigmab_plugin.report.tree_figure import tree_svg

from .sample import LEAVES, ROWS, report, tree

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting, and collects text, identifiers and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # In HTML only void elements and SVG shapes may close themselves.
        assert tag in VOID or "svg" in self.open, tag
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + "\n"

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.addresses.append(value or "")


@pytest.mark.parametrize("data", [report(), ReportData("Nothing yet")], ids=["full", "empty"])
def test_page_is_well_formed_and_self_contained(data: ReportData) -> None:
    text = render(data)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert "<script" not in text
    assert not re.search(r"@import|url\(", text)
    # The one address in the page may be none at all: nothing is fetched, not even a name space.
    assert "http" not in text
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(figure)


def test_names_are_escaped() -> None:
    page = Page(render(report()))
    for text in ("Tree <of> four & leaves", "dog & <wolf>", "One <run> only.", "sigmab demo --out 'a <b>'"):
        assert text in page.text


def test_page_shows_every_figure_beside_its_twin() -> None:
    text = Page(render(report())).text.replace("\u00a0", " ")
    for figure in ("108,123", "301,231", "21.30", "0.44", "39.7 %", "96.94 %", "95.83 %"):
        assert figure in text
    assert "1.11 pp above its static twin" in text
    assert "3.00 times as many parameters" in text


def test_of_several_trees_the_one_that_is_meant_is_named() -> None:
    rows = report().rows
    tree = next(row for row in rows if row.role == "sigmab")
    text = Page(render(ReportData("t", rows=(*rows, replace(tree, name="deeper <tree>"))))).text
    assert f"Accuracy of {tree.name}" in text
    assert f"{tree.name} (96.94" in text
    assert "The tree (" not in text


def test_page_without_twin_says_so() -> None:
    data = report()
    rows = tuple(row for row in data.rows if row.role != "twin")
    assert "No static twin was trained" in render(ReportData("t", rows=rows))


def test_missing_parts_say_how_to_get_them() -> None:
    text = Page(render(ReportData("Nothing yet"))).text
    for hint in ("sigmab evaluate --data", "sigmab finetune", "no channel statistics", "not recorded"):
        assert hint in text


def test_extra_sections_come_before_the_origin() -> None:
    text = render(report())
    assert "<p>extra part</p>" in text
    assert text.index("What the numbers mean") < text.index("extra part") < text.index('id="how-it-was-made"')


def test_heatmap_groups_classes_by_their_main_leaf() -> None:
    text = render(report())
    order = [text.index(f'title="{name}"') for name in ("cat", "dog &amp; &lt;wolf&gt;", "never")]
    assert order == sorted(order)
    assert ">80</td>" in text


@pytest.mark.parametrize("compact", [False, True])
def test_tree_names_all_nodes_and_shares(compact: bool) -> None:
    root = ElementTree.fromstring(tree_svg(tree(), (0.4, 0.3, 0.2, 0.1), compact=compact))
    texts = [element.text or "" for element in root.iter("text")]
    for leaf in LEAVES:
        assert any(text.startswith(leaf) for text in texts)
    assert {"40.0 %", "30.0 %", "20.0 %", "10.0 %", "70.0 %"} <= set(texts)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter("rect"):
        assert float(element.attrib["x"]) >= 0
        assert float(element.attrib["x"]) + float(element.attrib["width"]) <= width
        assert float(element.attrib["y"]) + float(element.attrib["height"]) <= height


def test_written_json_reads_back_as_the_same_report(tmp_path: Path) -> None:
    page, record = write_report(tmp_path / "deep" / "report.html", report())
    assert page.read_text(encoding="utf-8") == render(report())
    again = ReportData.from_dict(json.loads(record.read_text(encoding="utf-8")))
    assert again == report()
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    lost = Curve(
        "SigmaB", "sigmab", (1, 2), {"train_loss": [1.0, float("nan")], "val_accuracy": [float("inf"), 0.5]}
    )
    row = replace(ROWS[1], accuracy=float("nan"))
    page, record = write_report(tmp_path / "report.html", ReportData("t", rows=(row,), curves=(lost,)))
    assert json.loads(record.read_text())["curves"][0]["values"]["train_loss"] == [1.0, None]
    assert "nan" not in Page(page.read_text(encoding="utf-8")).text


def test_a_report_with_numbers_that_were_not_finite_is_drawn_again() -> None:
    panel = replace(report().channels[0], activation=((0.1, float("nan"), 0.5, 0.0), (0.9, 0.1, 0.6, 0.0)))
    lost = replace(report(), channels=(panel,))
    again = ReportData.from_dict(json.loads(json.dumps(lost.to_dict())))
    assert again.channels[0].activation[0][1] is None
    assert render(again) == render(lost)


@pytest.mark.parametrize("name", ["report.json", "report", "report.txt"])
def test_a_page_that_is_not_named_html_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        write_report(tmp_path / name, report())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ['{"format": "sigmab-plan"}', "[]", "no JSON"])
def test_only_the_numbers_of_a_report_are_replaced(tmp_path: Path, content: str) -> None:
    other = tmp_path / "plan.json"
    other.write_text(content)
    with pytest.raises(ConfigError, match=r"would replace .*plan\.json"):
        write_report(tmp_path / "plan.html", report())
    assert other.read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    for _ in range(2):
        write_report(tmp_path / "mine.htm", report())
    assert (tmp_path / "mine.json").exists()


def test_names_that_are_not_utf8_do_not_lose_the_report(tmp_path: Path) -> None:
    name = os.fsdecode(b"d\xff.npz")
    page, record = write_report(tmp_path / "report.html", replace(report(), title=name))
    assert ReportData.from_dict(json.loads(record.read_text(encoding="utf-8"))).title == name
    assert "d\\udcff.npz" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a SigmaB report"),
        ({"version": 99}, "upgrade"),
        ({"rows": [{"name": "x"}]}, "altered"),
    ],
)
def test_other_files_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ReportData.from_dict({**report().to_dict(), **change})
