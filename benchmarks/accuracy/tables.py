"""Tables of the accuracy benchmark, from the result files of ``run.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .titles import HEADLINES, PAIRS, TITLES

FORMAT = 1
Result = dict[str, Any]

COLUMNS = (
    "network",
    "runs",
    "epochs",
    "accuracy %",
    "mean class %",
    "active parameters",
    "stored parameters",
    "MACs",
    "bytes read",
    "balance",
)


def read_results(folder: Path) -> dict[str, list[Result]]:
    """Result files of one experiment, by arm, in the order of the recipe."""
    found: dict[str, list[Result]] = {}
    for file in sorted(folder.glob("*-seed*.json")):
        record = json.loads(file.read_text())
        if record.get("format") != FORMAT:
            raise SystemExit(f"{file}: format {record.get('format')!r}; this report reads {FORMAT}")
        found.setdefault(record["arm"], []).append(record)
    if not found:
        raise SystemExit(f"{folder}: no results; run benchmarks/run.py first")
    recipes = [record["recipe"]["arms"] for runs in found.values() for record in runs]
    order = ["dense", *max(recipes, key=len)]
    return {
        arm: found[arm] for arm in sorted(found, key=lambda a: order.index(a) if a in order else len(order))
    }


def accuracy_tables(folder: Path) -> str:
    """Markdown: one row per arm, paired differences, what the average hides, and how the figures were made."""
    results = read_results(folder)
    parts = [*_tables(results), _robustness(_trained(results)), _provenance(results)]
    return "\n\n".join(parts) + "\n"


def _trained(results: dict[str, list[Result]]) -> dict[str, list[Result]]:
    return {arm: runs for arm, runs in results.items() if runs[0]["epochs"]}


def _tables(results: dict[str, list[Result]]) -> list[str]:
    """Networks after fine-tuning with what their controls say; then those that were not trained."""
    trained = _trained(results)
    parts = [_table(trained), *_differences(trained)]
    dense = {arm: runs for arm, runs in trained.items() if arm == "dense"}
    untrained = {arm: runs for arm, runs in results.items() if arm not in trained}
    if untrained:
        parts += ["Without training; calibration samples, no labels:", _table({**dense, **untrained})]
        parts += _differences(untrained)
    return parts


def summary(results: Path) -> str:
    """Markdown: the table of every experiment without its ablations, and what its controls say."""
    parts = []
    for folder in experiments(results):
        found = headlines(folder)
        first = next(iter(found.values()))[0]
        parts += [f"**{folder.name}**: {first['note']}.", *_tables(found)]
    return "\n\n".join(parts) + "\n"


def headlines(folder: Path) -> dict[str, list[Result]]:
    """The results that answer the question in short; all of them in an experiment that names none."""
    found = read_results(folder)
    chosen = HEADLINES.get(folder.name, tuple(found))
    return {arm: found[arm] for arm in chosen if arm in found}


def experiments(results: Path) -> list[Path]:
    """Folders with results of this benchmark, in the order of the headlines; others may lie beside them."""
    found = [p for p in results.iterdir() if p.is_dir() and any(p.glob("*-seed*.json"))]
    order = list(HEADLINES)
    return sorted(found, key=lambda p: (order.index(p.name) if p.name in order else len(order), p.name))


def _table(results: dict[str, list[Result]]) -> str:
    """One row per arm."""
    dense = results.get("dense", [None])[0]
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for arm, runs in results.items():
        counts = runs[0]["counts"]
        saved = "" if dense is None or arm == "dense" else _saving(counts, dense["counts"])
        cells = [
            TITLES.get(arm, arm),
            str(len(runs)),
            str(runs[0]["epochs"]),
            spread([r["test"]["accuracy"] for r in runs]),
            spread([r["test"]["mean_class_accuracy"] for r in runs]),
            f"{counts['active_parameters']:,}{saved}".replace(",", " "),
            f"{counts['stored_parameters']:,}".replace(",", " "),
            f"{counts['active_macs'] / 1e6:.1f} M",
            f"{counts['active_bytes'] / 1e6:.2f} MB",
            spread([r["test"]["balance"] for r in runs], digits=2) if "balance" in runs[0]["test"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _robustness(results: dict[str, list[Result]]) -> str:
    """Markdown: rare classes, calibration, corruptions, routing."""
    first = next(iter(results.values()))[0]
    corruptions = [
        name for name in first["robustness"] if name not in ("calibration_error", "leaf_unchanged")
    ]
    columns = ["network", "rarest quarter of classes %", *(f"{name} %" for name in corruptions)]
    columns += ["calibration error", "leaf unchanged %"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, runs in results.items():
        checks = [r["robustness"] for r in runs]
        cells = [TITLES.get(arm, arm), spread([r["test"]["rare_class_accuracy"] for r in runs])]
        cells += [spread([check[name] for check in checks]) for name in corruptions]
        cells.append(spread([check["calibration_error"] for check in checks]))
        stays = [check["leaf_unchanged"] for check in checks if "leaf_unchanged" in check]
        cells.append(spread(stays) if stays else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], *, digits: int = 2) -> str:
    """Mean, and the standard deviation where there are several values."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _saving(counts: dict[str, int], dense: dict[str, int]) -> str:
    return f" (−{100 * (1 - counts['active_parameters'] / dense['active_parameters']):.1f} %)"


def _differences(results: dict[str, list[Result]]) -> list[str]:
    """One line for each pair of which both are there."""
    lines = []
    for tree, control in PAIRS:
        if tree not in results or control not in results:
            continue
        by_seed = {r["seed"]: r["test"]["accuracy"] for r in results[control]}
        gaps = [r["test"]["accuracy"] - by_seed[r["seed"]] for r in results[tree] if r["seed"] in by_seed]
        if gaps:
            shown = spread(gaps).replace("-", "−")
            lines.append(
                f"{TITLES[tree]} minus {TITLES[control]}, over {len(gaps)} paired run(s): {shown} points."
            )
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _provenance(results: dict[str, list[Result]]) -> str:
    runs = [r for group in results.values() for r in group]
    first = runs[0]
    minutes = ", ".join(
        f"{TITLES.get(arm, arm)} {spread([r['train_seconds'] / 60 for r in group], digits=1)}"
        for arm, group in _trained(results).items()
    )
    samples = {
        f"{r['epochs']} epochs ({r['train_samples']:,} samples)".replace(",", " ")
        for r in runs
        if r["arm"] != "dense" and r["epochs"]
    }
    dense = [
        f"{r['epochs']} epochs ({r['train_samples']:,} samples)".replace(",", " ")
        for r in runs
        if r["arm"] == "dense"
    ]
    seeds = sorted({r["seed"] for r in runs if r["arm"] != "dense"})
    networks = sorted({r["dense_seed"] for r in runs})
    versions = ", ".join(
        f"{name} {first[name]}" for name in ("torch", "torch-pruning", "torch-geometric") if name in first
    )
    return (
        f"{first['note']}. Dense: {', '.join(sorted(set(dense))) or 'not listed'}; "
        f"the rows below: {', '.join(sorted(samples)) or 'none'} from it. "
        f"Dense networks: {len(networks)}; seeds: {', '.join(map(str, seeds))}; ± is one standard deviation over runs. "
        f"Test part ({first['test']['samples']} samples) read once per run, last epoch's weights. "
        f"Training minutes on a shared machine: {minutes}. "
        f"{first['machine']}, {first['threads']} thread(s), {first['processor']}; {versions}."
    )
