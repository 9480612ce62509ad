"""The table of what networks cost to make and to train, from the result files of ``cost.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = (
    "network",
    "making it, CPU s",
    "in epochs of the dense network",
    "peak memory",
    "training step, CPU ms",
    "of the dense network's",
    "peak memory",
)


def cost_table(results: Path) -> str:
    """Markdown: one table for each experiment."""
    files = sorted(results.glob("cost-*.json"))
    if not files:
        raise SystemExit(f"{results}: no cost-*.json; run benchmarks/cost.py first")
    parts = [_table(json.loads(file.read_text())) for file in files]
    return "\n\n".join(parts) + "\n"


def _table(record: dict[str, Any]) -> str:
    rows = record["rows"]
    dense = rows[0]["step_milliseconds"]
    epoch = rows[0]["steps_per_epoch"] * dense / 1e3
    lines = [
        f"**{record['experiment']}**: {record['note']}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        cells = [row["network"], "", "", "", "", "", ""]
        if "making_seconds" in row:
            making = row["making_seconds"]
            cells[1:4] = [f"{making:.1f}", f"{making / epoch:.2f}", f"{row['making_mib']:.0f} MiB"]
        if "step_milliseconds" in row:
            step = row["step_milliseconds"]
            cells[4:] = [f"{step:.0f}", f"{step / dense:.2f}", f"{row['step_mib']:.0f} MiB"]
        lines.append("| " + " | ".join(cells) + " |")
    first, source = rows[0], record["provenance"]
    lines += [
        "",
        f"{first['calibration_samples']} calibration samples, {first['repair_samples']} of them for repair; training "
        f"steps of {record['batch_size']} samples, {record['steps']} measured; one thread, "
        f"the least of {record['repeats']} runs. "
        f"{source['machine']}; torch {source['torch']}, torch-pruning {source['torch-pruning']}.",
    ]
    return "\n".join(lines)
