from __future__ import annotations

from dataclasses import replace

import pytest

from sigmab_plugin.report import Row, Table, counts_table, rows_to_json
from sigmab_plugin.report import format as fmt
from sigmab_plugin.report.tables import display_width

from .sample import ROWS


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1_000, "1.00 k"),
        (9_405_834, "9.41 M"),
        (99_960, "100 k"),
        (4_112_000_000, "4.11 G"),
    ],
)
def test_count_keeps_three_digits(value: int, text: str) -> None:
    assert fmt.count(value) == text


def test_absent_figures_are_a_dash_and_never_a_zero() -> None:
    assert fmt.count(None) == fmt.size(None) == fmt.integer(None) == fmt.percent(None) == fmt.ABSENT
    assert fmt.percent(float("nan")) == fmt.ABSENT


@pytest.mark.parametrize(
    ("difference", "text"), [(0.0111, "+1.1 pp"), (-0.004, "−0.4 pp"), (0.0001, "±0.0 pp")]
)
def test_differences_carry_their_sign(difference: float, text: str) -> None:
    assert fmt.points(difference) == text


def test_a_column_has_one_unit() -> None:
    unit = fmt.column_unit([1_000, 2_500_000, None])
    assert [fmt.in_unit(value, unit) for value in (1_000, 2_500_000, None)] == ["0.00", "2.50", fmt.ABSENT]


def test_text_table_lines_up() -> None:
    lines = counts_table(ROWS).text().splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[0].split()[:2] == ["network", "accuracy"]
    # Numbers are right-aligned: every line ends where the rule ends.
    assert {len(line) for line in lines} == {len(lines[1])}
    column = lines[0].index("of dense") + len("of dense")
    assert [line[:column].split()[-2:] for line in lines[2:]] == [
        ["100.0", "%"],
        ["39.7", "%"],
        ["36.9", "%"],
    ]


def test_wide_and_combining_characters_take_their_cells() -> None:
    assert display_width("é") == 1
    assert display_width("網路") == 4
    table = Table(("network", "n"), (("網路", "1"), ("e\u0301", "22")), (False, True))
    assert {display_width(line) for line in table.text().splitlines()} == {len("network") + 2 + 2}


def test_markdown_escapes_the_column_separator() -> None:
    table = Table(("a", "n"), (("x|y", "1"),), (False, True))
    assert table.markdown().splitlines() == ["| a | n |", "| --- | ---: |", "| x\\|y | 1 |"]


def test_ratios_need_a_dense_row() -> None:
    alone = [row for row in ROWS if row.role != "dense"]
    assert counts_table(alone).cells[0][3] == fmt.ABSENT
    assert rows_to_json(alone)[0]["active_to_dense"] is None
    assert rows_to_json(ROWS)[1]["active_to_dense"] == pytest.approx(108_123 / 272_474)


def test_unmeasured_row_prints_dashes() -> None:
    row: Row = replace(ROWS[0], accuracy=None, active_macs=None)
    cells = counts_table([row]).cells[0]
    assert cells[1] == cells[5] == fmt.ABSENT


def test_repeats_print_their_deviation() -> None:
    assert counts_table([replace(ROWS[0], accuracy_sd=0.0021)]).cells[0][1] == "97.35 ± 0.21 %"
