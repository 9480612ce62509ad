"""Tables from the result files of ``benchmarks/run.py``; nothing is typed in by hand.

    python benchmarks/report.py                    # print all tables
    python benchmarks/report.py --write README.md  # put them between the markers
    python benchmarks/report.py --check README.md  # fail if a table there differs from the results

Markers: ``<!-- results: NAME -->`` … ``<!-- end results -->`` hold everything about one experiment, NAME being a folder
of ``benchmarks/results``, ``cost``, ``speed`` or ``deploy``; ``<!-- results:begin -->`` … ``<!-- results:end -->`` hold
all short tables.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from cost_table import cost_table  # noqa: E402
from deploy_table import deploy_table  # noqa: E402
from speed_table import speed_table  # noqa: E402

RESULTS = HERE / "results"
OTHER_TABLES = {"cost": cost_table, "speed": speed_table, "deploy": deploy_table}
FORMAT = 1
Result = dict[str, Any]

TITLES = {
    "dense": "dense",
    "sigmab": "SigmaB, the paper's loss",
    "twin": "static twin",
    "sigmab-teacher": "SigmaB + teacher",
    "twin-teacher": "static twin + teacher",
    "twin-equal-teacher": "static twin widened to SigmaB's active parameters + teacher",
    "pruned-magnitude-teacher": "Torch-Pruning, group magnitude + teacher",
    "pruned-taylor-teacher": "Torch-Pruning, group Taylor + teacher",
    "sigmab-sharp-teacher": "SigmaB + teacher, router temperature 0.25",
    "sigmab-hard-teacher": "SigmaB + teacher, hard routing in all epochs",
    "sigmab-sharp-lambda-0-teacher": "SigmaB + teacher, router temperature 0.25, λ = 0",
    "sigmab-ours": "SigmaB + teacher, frozen backbone, inner channels by activation",
    "sigmab-frozen-teacher": "SigmaB + teacher, frozen backbone",
    "twin-frozen-teacher": "static twin + teacher, frozen backbone",
    "twin-ours": "static twin + teacher, frozen backbone, inner channels by activation",
    "twin-equal-frozen-teacher": "static twin of the tree's active size + teacher, frozen backbone",
    "sigmab-branch-rate": "SigmaB, inner channels by activation, rates by level",
    "sigmab-branch-rate-teacher": "SigmaB + teacher, rates by level",
    "twin-double-rate-teacher": "static twin + teacher, twice the learning rate",
    "sigmab-branch-decay-teacher": "SigmaB + teacher, rates and weight decay by level",
    "twin-low-decay-teacher": "static twin + teacher, a quarter of the weight decay",
    "sigmab-branch-rate-teacher-30": "SigmaB + teacher, rates by level, 30 epochs",
    "sigmab-branch-decay-teacher-30": "SigmaB + teacher, rates and weight decay by level, 30 epochs",
    "twin-teacher-30": "static twin + teacher, 30 epochs",
    "twin-equal-teacher-30": "static twin widened to SigmaB's active parameters + teacher, 30 epochs",
    "pruned-magnitude-teacher-30": "Torch-Pruning, group magnitude + teacher, 30 epochs",
    "twin-double-rate": "static twin, twice the learning rate",
    "twin-equal": "static twin widened to SigmaB's active parameters",
    "pruned-magnitude": "Torch-Pruning, group magnitude",
    "pruned-taylor": "Torch-Pruning, group Taylor",
    "random-partition": "SigmaB, the paper's loss, random partition",
    "lambda-0": "SigmaB, the paper's loss, λ = 0",
    "balanced": "SigmaB, the paper's loss, load balancing 0.3",
    "slow-router": "SigmaB, the paper's loss, routers at a tenth of the rate",
    "shared-0.25": "SigmaB, the paper's loss, κ = 0.25",
    "shared-0.75": "SigmaB, the paper's loss, κ = 0.75",
    "bn-per-leaf": "SigmaB, the paper's loss, BatchNorm re-estimated per leaf",
    "balanced-clusters": "SigmaB, the paper's loss, clusters of equal size",
    "pooled-deviation": "SigmaB, the paper's loss, features pooled as mean and deviation",
    "trained-projection": "SigmaB, the paper's loss, trained projections",
    "shared-0.25-0.75": "SigmaB, the paper's loss, κ = 0.25, then 0.75",
    "shared-0.75-0.25": "SigmaB, the paper's loss, κ = 0.75, then 0.25",
    "one-level": "SigmaB, the paper's loss, one level, two leaves",
    "three-levels": "SigmaB, the paper's loss, three levels, eight leaves",
    "uneven-widths": "SigmaB, the paper's loss, one half of the tree narrower",
    "sigmab-repaired": "SigmaB, the paper's loss, from a least-squares repair",
    "sigmab-branch-rate-repaired": "SigmaB, inner channels by activation, rates by level, from a least-squares repair",
    "twin-repaired": "static twin, from a least-squares repair",
    "untrained-sigmab": "SigmaB, weights as copied",
    "untrained-twin": "static twin, weights as copied",
    "untrained-twin-bn": "static twin, BatchNorm re-estimated",
    "untrained-pruned-bn": "Torch-Pruning, group magnitude, BatchNorm re-estimated",
    "untrained-pruned-repaired": "Torch-Pruning, group magnitude, least-squares repair",
    "untrained-sigmab-repaired": "SigmaB, least-squares repair",
    "untrained-pooled-deviation-repaired": "SigmaB, least-squares repair, features pooled as mean and deviation",
    "untrained-trained-projection-repaired": "SigmaB, least-squares repair, trained projections",
    "untrained-shared-0.25-0.75-repaired": "SigmaB, least-squares repair, κ = 0.25, then 0.75",
    "untrained-shared-0.75-0.25-repaired": "SigmaB, least-squares repair, κ = 0.75, then 0.25",
    "untrained-twin-repaired": "static twin, least-squares repair",
    "untrained-twin-equal-repaired": "static twin widened to SigmaB's active parameters, least-squares repair",
    "untrained-twin-repaired-bn": "static twin, least-squares repair, BatchNorm re-estimated",
}
#: Made by the builders of ``accuracy/variants.py``; each with the paper's loss, and repaired without training.
CANDIDATES = ("pooled-deviation", "trained-projection", "shared-0.25-0.75", "shared-0.75-0.25")
#: The tree with the paper's loss and one part varied; each stands beside that tree.
VARIATIONS = (
    "balanced",
    "slow-router",
    "shared-0.25",
    "shared-0.75",
    "bn-per-leaf",
    "balanced-clusters",
    "one-level",
    "three-levels",
    "uneven-widths",
    "sigmab-repaired",
    *CANDIDATES,
)
#: On the page of the benchmarks, not in the short tables.
ABLATIONS = {
    *VARIATIONS,
    *(f"untrained-{name}-repaired" for name in CANDIDATES),
    "twin-double-rate",
    "twin-double-rate-teacher",
    "twin-low-decay-teacher",
    "sigmab-branch-rate-teacher",
    "sigmab-branch-rate-teacher-30",
    "sigmab-branch-decay-teacher-30",
    "twin-teacher-30",
    "twin-equal-teacher-30",
    "pruned-magnitude-teacher-30",
    "sigmab-sharp-teacher",
    "sigmab-hard-teacher",
    "sigmab-sharp-lambda-0-teacher",
    "sigmab-frozen-teacher",
    "twin-frozen-teacher",
    "random-partition",
    "lambda-0",
    "twin-repaired",
    "sigmab-branch-rate-repaired",
    "untrained-twin-bn",
    "untrained-twin-repaired-bn",
}
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
_SUMMARY = re.compile(r"(<!-- results:begin -->\n)(.*?)(<!-- results:end -->)", re.DOTALL)
_BLOCK = re.compile(r"(<!-- results: (?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- end results -->)", re.DOTALL)


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


def details(folder: Path) -> str:
    """Markdown: one row per arm, paired differences, what the average hides, and how the figures were made."""
    if folder.name in OTHER_TABLES:
        return OTHER_TABLES[folder.name](folder.parent)
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
    for folder in _folders(results):
        found = {arm: runs for arm, runs in read_results(folder).items() if arm not in ABLATIONS}
        first = next(iter(found.values()))[0]
        parts += [f"**{folder.name}**: {first['note']}.", *_tables(found)]
    return "\n\n".join(parts) + "\n"


def _folders(results: Path) -> list[Path]:
    """Experiments that have results of this benchmark; other folders may lie beside them."""
    return sorted(p for p in results.iterdir() if p.is_dir() and any(p.glob("*-seed*.json")))


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
    """SigmaB minus its control, run by run: both saw the same batches from the same dense network."""
    lines = []
    pairs = (
        ("sigmab", "twin"),
        ("sigmab-teacher", "twin-teacher"),
        ("sigmab-ours", "twin-frozen-teacher"),
        ("sigmab-ours", "twin-ours"),
        ("sigmab-ours", "twin-equal-frozen-teacher"),
        ("sigmab-frozen-teacher", "twin-frozen-teacher"),
        ("sigmab-teacher", "twin-equal-teacher"),
        ("sigmab-teacher", "pruned-magnitude-teacher"),
        ("sigmab-teacher", "pruned-taylor-teacher"),
        *(("sigmab-branch-rate", a) for a in ("twin", "twin-equal", "pruned-magnitude", "pruned-taylor")),
        ("sigmab-branch-rate-teacher", "twin-teacher"),
        ("sigmab-branch-rate-teacher", "twin-double-rate-teacher"),
        ("sigmab-branch-rate-teacher", "twin-equal-teacher"),
        ("sigmab-branch-rate-teacher", "pruned-magnitude-teacher"),
        ("sigmab-branch-rate-teacher", "sigmab-teacher"),
        *(
            ("sigmab-branch-decay-teacher", f"{control}-teacher")
            for control in ("twin", "twin-low-decay", "twin-equal", "pruned-magnitude", "sigmab-branch-rate")
        ),
        *(
            (f"{tree}-teacher-30", f"{control}-teacher-30")
            for tree in ("sigmab-branch-rate", "sigmab-branch-decay")
            for control in ("twin", "twin-equal", "pruned-magnitude")
        ),
        ("sigmab", "twin-equal"),
        ("sigmab", "pruned-magnitude"),
        ("sigmab", "pruned-taylor"),
        *(("sigmab", arm) for arm in ("random-partition", "lambda-0")),
        *((arm, "sigmab") for arm in VARIATIONS),
        ("sigmab-branch-rate", "twin-double-rate"),
        ("sigmab-repaired", "twin-repaired"),
        ("sigmab-branch-rate-repaired", "twin-repaired"),
        ("sigmab-branch-rate-repaired", "sigmab-branch-rate"),
        ("twin-repaired", "twin"),
        ("untrained-sigmab-repaired", "untrained-twin-repaired"),
        ("untrained-sigmab-repaired", "untrained-twin-equal-repaired"),
        ("untrained-sigmab-repaired", "untrained-pruned-repaired"),
        ("untrained-sigmab-repaired", "untrained-pruned-bn"),
        *((f"untrained-{name}-repaired", "untrained-sigmab-repaired") for name in CANDIDATES),
    )
    for tree, control in pairs:
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
    parser.add_argument("--check", help="file with markers; fails if it differs from the results")
    parser.add_argument("--write", help="file with markers; its tables are replaced")
    arguments = parser.parse_args(argv)
    results = Path(arguments.results)
    if arguments.check or arguments.write:
        file = Path(arguments.write or arguments.check)
        text = file.read_text()
        if not _BLOCK.search(text) and not _SUMMARY.search(text):
            raise SystemExit(f"{file}: no '<!-- results: NAME -->' block; add one where the table belongs")
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
    for folder in _folders(results):
        print(f"## {folder.name}\n\n{details(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
