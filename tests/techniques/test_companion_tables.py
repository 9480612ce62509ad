"""Tables in the pages of the companions are those of the benchmarks' result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = [
    ("docs/legonet.md", "legonet-digits.json"),
    ("docs/legonet.md", "legonet-speed.json"),
    ("docs/combining.md", "compose.json"),
    ("docs/depth-pruning.md", "depth_pruning.json"),
    ("docs/mix-and-match.md", "mix_and_match-digits.json"),
]


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the pages are not in the source distribution")
@pytest.mark.parametrize(("page", "result"), TABLES)
def test_page_holds_the_measured_table(page: str, result: str) -> None:
    table = json.loads((ROOT / "benchmarks" / "results" / result).read_text())["table"]
    assert table in (ROOT / page).read_text()
