"""The table of speed and memory, from the result files of the scripts that measure them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

STEPS = ("steps-cifar_resnet50-cpu", "steps-cifar_resnet50-quarter-cpu")


def speed_table(results: Path) -> str:
    """Markdown: each claim with its floor, its limit and whether it is met."""
    lines = ["| measured | value | floor | limit | | script |", "|---|---|---|---|---|---|"]
    for row in _read(results, "core_speed")["rows"]:
        lines.append(
            _line(row["claim"], row["measured"], "core_speed.py", floor=row["floor"], limit=row["limit"])
        )
    for name in STEPS:
        step = _read(results, name)
        ratio, floor = step["soft_over_dense"]["median"], step["floor_over_dense"]["median"]
        claim = (
            f"soft training step / dense step, ResNet-50 at width {step['width']:g}, batch {step['batch']}"
        )
        lines.append(_line(claim, ratio, "steps.py", floor=floor, limit=1.1 * step["mac_ratio"]))
    for row in _read(results, "memory")["rows"]:
        claim = (
            f"peak memory of restructuring ResNet-50, {row['samples']} samples in batches of {row['batch']}"
        )
        lines.append(
            _line(claim, row["restructuring_mib"], "memory.py", limit=row["limit_mib"], unit=" MiB", digits=0)
        )
    for case in _read(results, "import_time")["cases"]:
        if case["limit"] is not None:
            value = statistics.median(case["milliseconds"])
            lines.append(
                _line(case["name"], value, "import_time.py", limit=case["limit"], unit=" ms", digits=1)
            )
    core = _read(results, "core_speed")
    machine, threads = core["machine"], core["options"]["threads"]
    lines += [
        "",
        f"{machine['processor']}, {machine['cores']} processors, {threads} threads; torch {core['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def _read(results: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return record


def _line(
    claim: str,
    value: float,
    script: str,
    *,
    limit: float | None,
    floor: float | None = None,
    unit: str = "",
    digits: int = 3,
) -> str:
    def shown(number: float | None) -> str:
        if not number:
            return ""  # no floor
        return f"{number:.{digits}f}{unit}" if abs(number) >= 0.01 else f"{number:.0e}{unit}"

    verdict = "" if limit is None else "met" if value <= limit else "**not met**"
    return f"| {claim} | {shown(value)} | {shown(floor)} | {shown(limit)} | {verdict} | `{script}` |"
