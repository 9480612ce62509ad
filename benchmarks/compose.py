"""Techniques on top of each other on MLPerf Tiny's DS-CNN and real keywords, through ``sigmab compare``.

Needs a folder with ``checkpoints/kws_dscnn_mlperf.safetensors`` and ``kws_sc2_mfcc_int8.npz``. The task is the four
words yes, no, up, down with the data set's speaker-disjoint split; the pretrained classifier's rows of these four
words make the dense network. Training and calibration read split 0, choices split 1, the table split 2.

    python benchmarks/compose.py --data FOLDER --output benchmarks/results/compose.json --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from sigmab_plugin.cli import main as sigmab
from sigmab_plugin.models import load_mlperf_ds_cnn

WORDS = ("down", "no", "up", "yes")

TREE = {"algorithm": "sigmab", "levels": ["block2", "block3"], "head": "pool", "projection_dim": 16}
DEPTH = {
    "algorithm": "depth_pruning",
    "cut": "block3",
    "freeze": False,
    "epochs": [4, 2],
    "learning_rates": [2e-3, 5e-4],
}
PRUNE = {"algorithm": "torch_pruning", "pruning_ratio": 0.25}
MASKS = {
    "algorithm": "mix_and_match",
    "scores": ["magnitude"],
    "strategies": ["min", "midpoint", "alpha_0.7"],
    "sparsities": [0.5, 0.7],
    "small_layer_parameters": 500,
    "finetune_epochs": 2,
    "finetune_lr": 0.002,
}
CODEBOOK = {
    "algorithm": "legonet",
    "codebook_size": 256,
    "scale": "row",
    "reestimate_batchnorm": True,
    "finetune_epochs": 3,
}
LEAVES = {"algorithm": "depth_pruning", "epochs": [4, 2], "learning_rates": [5e-3, 1e-3]}

RUNS: dict[str, list[dict[str, Any]]] = {
    "depth pruning": [DEPTH],
    "Torch-Pruning": [PRUNE],
    "SigmaB": [TREE],
    "depth pruning -> SigmaB": [DEPTH, {**TREE, "head": "auxiliary_head"}],
    "Torch-Pruning -> SigmaB": [PRUNE, TREE],
    "SigmaB -> Mix-and-Match": [TREE, MASKS],
    "SigmaB -> LegoNet": [TREE, CODEBOOK],
    "SigmaB -> depth-pruned leaves": [TREE, LEAVES],
    "Torch-Pruning -> SigmaB -> Mix-and-Match": [PRUNE, TREE, MASKS],
}


def prepare(source: Path, work: Path, train_clips: int | None, seed: int) -> None:
    """Clips as ``(N, 1, 49, 10)`` float32 by split, and the dense network's weights."""
    work.mkdir(parents=True, exist_ok=True)
    archive = np.load(source / "kws_sc2_mfcc_int8.npz")
    words = [str(word) for word in archive["words"]]
    columns = [words.index(word) for word in WORDS]
    scale, zero = float(archive["scale"]), float(archive["zero_point"])
    values = ((archive["yesnoupdown_x"].astype(np.float32) - zero) * scale)[:, None]
    targets = np.searchsorted(np.array(columns), archive["yesnoupdown_y"]).astype(np.int64)
    splits: dict[str, np.ndarray] = {"classes": np.array(WORDS)}
    for number, name in enumerate(("train", "val", "test")):
        rows = np.flatnonzero(archive["yesnoupdown_split"] == number)
        if name == "train":
            rows = np.random.default_rng(seed).permutation(rows)[:train_clips]
        splits[f"{name}_x"], splits[f"{name}_y"] = values[rows], targets[rows]
    np.savez(work / "keywords.npz", **splits)  # type: ignore[arg-type]

    model, _ = load_mlperf_ds_cnn(source / "checkpoints" / "kws_dscnn_mlperf.safetensors")
    dense = model.state_dict()
    dense.update({name: dense[name][columns].clone() for name in ("fc.weight", "fc.bias")})
    save_file(dense, str(work / "dense.safetensors"))


def run(arguments: argparse.Namespace, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One seed of everything (clips that are drawn, k-means, heads, order of batches), and the config file."""
    work = arguments.work / f"seed{seed}"
    prepare(arguments.data, work, arguments.train_clips, seed)
    config = {
        "title": "Techniques on top of each other: DS-CNN, four keywords",
        "model": "sigmab_plugin.models.ds_cnn:DSCNN",
        "model_args": {"num_classes": 4},
        "weights": "dense.safetensors",
        "data": "keywords.npz",
        "validation_split": "val",
        "epochs": arguments.epochs,
        "finetune": {
            "optimizer": "adam",
            "lr": 2e-3,
            "weight_decay": 0.0,
            "batch_size": 64,
            "warmup_epochs": 0.5,
            "label_smoothing": 0.0,
            "distillation_weight": 1.0,
        },
        "runs": [{"name": name, "compression": sections} for name, sections in RUNS.items()],
    }
    file, out = work / "many.json", work / "out"
    file.write_text(json.dumps(config, indent=1) + "\n")
    code = sigmab(
        ["compare", "--config", str(file), "--out", str(out), "--threads", "1", "--seed", str(seed)]
    )
    if code:
        raise SystemExit(code)
    # Rows of earlier settings may lie there, too: the latest of a name counts.
    files = sorted((out / "rows").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    finished = [json.loads(path.read_text()) for path in files]
    extra = {row["row"]["name"]: row for row in finished}
    report = json.loads((out / "report.json").read_text())
    rows = [
        {
            **row,
            **{key: extra[row["name"]][key] for key in ("validation_accuracy", "leaf_shares", "seconds")},
        }
        for row in report["rows"]
    ]
    result = {"seed": seed, "rows": rows, **{key: report[key] for key in ("facts", "provenance", "notes")}}
    return result, config


def combined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all seeds: mean and standard deviation of the accuracy, means of the rest."""
    result = {"name": rows[0]["name"], "role": rows[0]["role"]}
    for key in ("active_bytes", "stored_bytes", "active_macs", "active_parameters", "stored_parameters"):
        result[key] = round(statistics.fmean(row[key] for row in rows))
    accuracies = [row["accuracy"] for row in rows]
    result["accuracy"] = statistics.fmean(accuracies)
    result["accuracy_sd"] = statistics.stdev(accuracies) if len(rows) > 1 else None
    shares = [row["leaf_shares"] for row in rows]
    result["leaves"] = len(shares[0])
    result["leaves_used"] = statistics.fmean(sum(share >= 0.01 for share in leaves) for leaves in shares)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the leaf column counts leaves that at least 1 % of the test clips reach."""
    lines = [
        "| | accuracy, % | active kB | stored kB | MACs | leaves in use |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        deviation = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.2f}"
        cells = [
            row["name"].replace("->", "→"),
            f"{100 * row['accuracy']:.2f}{deviation}",
            f"{row['active_bytes'] / 1000:.1f}",
            f"{row['stored_bytes'] / 1000:.1f}",
            f"{row['active_macs'] / 1e6:.2f} M",
            f"{round(row['leaves_used'], 1):g} of {row['leaves']}" if row["leaves"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache/compose"))
    parser.add_argument("--train-clips", type=int, help="clips to train on (default: all 12 440)")
    parser.add_argument("--epochs", type=int, default=5, help="fine-tuning after each restructuring")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    parts = []
    for seed in arguments.seeds:
        part, config = run(arguments, seed)
        parts.append(part)
    rows = [combined(list(cells)) for cells in zip(*(part["rows"] for part in parts), strict=True)]
    content = {
        "benchmark": "compose",
        "command": "python " + " ".join(sys.argv).replace(str(arguments.data), "FOLDER"),
        "data": "yes, no, up, down of Speech Commands v2, speakers disjoint across splits; accuracy on test",
        "seeds": arguments.seeds,
        "config": config,
        "rows": rows,
        "table": table(rows),
        "per_seed": parts,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print(content["table"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
