"""Tables from the result files of ``benchmarks/run.py``; nothing is typed in by hand.

    python benchmarks/report.py                    # print all tables
    python benchmarks/report.py --write README.md  # put them between the markers
    python benchmarks/report.py --check README.md  # fail if a table there differs from the results
    python benchmarks/report.py --write docs/accuracy.svg  # the figure; --check compares it, too

Markers: ``<!-- results: NAME -->`` … ``<!-- end results -->`` hold everything about one experiment, NAME being a folder
of ``benchmarks/results``, ``cost``, ``speed`` or ``deploy``; ``<!-- results:begin -->`` … ``<!-- results:end -->`` hold
all short tables.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from accuracy.figure import accuracy_figure  # noqa: E402
from accuracy.tables import accuracy_tables, experiments, summary  # noqa: E402
from cost_table import cost_table  # noqa: E402
from deploy_table import deploy_table  # noqa: E402
from speed_table import speed_table  # noqa: E402

RESULTS = HERE / "results"
OTHER_TABLES = {"cost": cost_table, "speed": speed_table, "deploy": deploy_table}
_SUMMARY = re.compile(r"(<!-- results:begin -->\n)(.*?)(<!-- results:end -->)", re.DOTALL)
_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- end results -->)", re.DOTALL)


def details(folder: Path) -> str:
    """Markdown: what the block of this name holds."""
    table = OTHER_TABLES.get(folder.name)
    return table(folder.parent) if table else accuracy_tables(folder)


def fill(text: str, results: Path) -> str:
    """``text`` with every marked block made anew."""
    text = _BLOCK.sub(lambda m: f"{m[1]}{details(results / m['name'])}{m[4]}", text)
    return _SUMMARY.sub(lambda m: f"{m[1]}{summary(results)}{m[3]}", text)


def main(argv: list[str] | None = None) -> int:
    """Print, write or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default=str(RESULTS))
    parser.add_argument(
        "--check", help="page with markers, or the figure; fails if it differs from the results"
    )
    parser.add_argument("--write", help="page with markers, whose tables are replaced, or the figure")
    arguments = parser.parse_args(argv)
    results = Path(arguments.results)
    if arguments.check or arguments.write:
        file = Path(arguments.write or arguments.check)
        if file.suffix == ".svg":
            text, filled = file.read_text() if file.exists() else "", accuracy_figure(results)
        else:
            text = file.read_text()
            if not _BLOCK.search(text) and not _SUMMARY.search(text):
                raise SystemExit(
                    f"{file}: no '<!-- results: NAME -->' block; add one where the table belongs"
                )
            filled = fill(text, results)
        if arguments.write:
            file.write_text(filled)
            return 0
        if filled == text:
            return 0
        sys.stdout.writelines(
            difflib.unified_diff(text.splitlines(True), filled.splitlines(True), str(file), "results")
        )
        print(
            f"{file}: figures differ from {results}; run benchmarks/report.py --write {file}", file=sys.stderr
        )
        return 1
    for folder in experiments(results):
        print(f"## {folder.name}\n\n{details(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
