"""The short table of the deployment benchmark, from its result file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLUMNS = {
    "dense cut alike, warm": ("warm", "dense, cut alike"),
    "SigmaB, warm": ("warm", "sigmab"),
    "single file, warm": ("warm", "sigmab, single file"),
    "pruned, warm": ("warm", "pruned"),
    "SigmaB, 500 MB/s": ("streamed, 500 MB/s", "sigmab"),
    "prefetch `both`": ("streamed, 500 MB/s", "sigmab, prefetch both"),
    "prefetch `likely`": ("streamed, 500 MB/s", "sigmab, prefetch likely"),
    "pruned, 500 MB/s": ("streamed, 500 MB/s", "pruned"),
    "pruned, prefetch": ("streamed, 500 MB/s", "pruned, prefetch"),
    "dense, prefetch": ("streamed, 500 MB/s", "dense, prefetch"),
}


def deploy_table(results: Path) -> str:
    """Markdown: latency as a share of the dense network's; bytes; memory; agreement with torch."""
    record: dict[str, Any] = json.loads((results / "deploy.json").read_text())
    rows = {(r["case"], r["backend"], r["mode"], r["variant"]): r for r in record["rows"] if "median_s" in r}
    pairs = list(dict.fromkeys((case, backend) for case, backend, _, _ in rows))
    measured = {(mode, variant) for _, _, mode, variant in rows}
    columns = {title: place for title, place in COLUMNS.items() if place in measured}
    lines = [
        f"| network | runtime | dense, warm | {' | '.join(columns)} | bytes read / active bytes |",
        "|---" * (len(columns) + 4) + "|",
    ]
    read = {
        g["case"]: g["measured"]
        for g in record["goals"]
        if g["goal"].startswith("bytes read") and "500 MB/s" in g["goal"]
    }
    for case, backend in pairs:
        dense = rows.get((case, backend, "warm", "dense"))
        cells = [case, backend, f"{1e3 * dense['median_s']:.1f} ms" if dense else ""]
        for mode, variant in columns.values():
            row = rows.get((case, backend, mode, variant))
            cells.append(f"{row['ratio']:.2f} ({row['ratio_of_minima']:.2f})" if row else "")
        share = read.get(f"{case}, {backend}")
        cells.append(f"{share:.3f}" if share else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_goals(record["goals"])]
    machine = record["machine"]
    rounds = [row["rounds"] for row in rows.values()]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines += [
        "",
        f"Medians as a share of the dense network in the same mode and runtime; in brackets the ratio of the fastest "
        f"rounds. {min(rounds)} to {max(rounds)} rounds each, fewest on the slowest bus. Batch 1, {machine['threads']} "
        f"threads, {machine['machine']}; {versions}. Streamed ExecuTorch networks cut in links were not exported.",
    ]
    lines += _memory(record["memory"]) + _agreement(record["agreement"])
    return "\n".join(lines) + "\n"


def _goals(found: list[dict[str, Any]]) -> list[str]:
    """One row a goal: its limit, in how many cases it is met, and the smallest and largest value measured."""
    lines = ["| goal | limit | met | measured |", "|---|---|---|---|"]
    for name in dict.fromkeys(goal["goal"] for goal in found):
        cases = [goal for goal in found if goal["goal"] == name]
        values = [goal["measured"] for goal in cases]
        digits = ".1e" if max(values) < 1e-3 else ".3f"
        span = " to ".join(dict.fromkeys(f"{value:{digits}}" for value in (min(values), max(values))))
        met = sum(goal["met"] for goal in cases)
        lines.append(f"| {name} | {cases[0]['limit']:g} | {met} of {len(cases)} | {span} |")
    return lines


def _memory(found: list[dict[str, Any]]) -> list[str]:
    return [
        f"\n{row['inferences']:,} random inputs through one runner ({row['case']}, width {row['width']:g}): bytes "
        f"counted at most {row['counted_to_budget']:.3f} of the budget, growth of the process "
        f"{row['rss_to_budget']:.3f}; the leaf changed in {100 * row['switch_rate']:.0f} % of the calls."
        for row in found
    ]


def _agreement(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    names = ", ".join(
        f"{row['backend']} {row['difference_on_same_leaf']:.1e} ({row['other_leaf']} on another leaf)"
        for row in found
    )
    first = found[0]
    return [
        f"\n{first['images']:,} real test images ({first['case']}, width {first['width']:g}), largest difference from "
        f"torch's hard routing where the leaf is the same: {names}. {100 * first['correct_torch']:.0f} % are "
        f"classified correctly ({first['weights']})."
    ]
