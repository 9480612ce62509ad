"""Depth pruning of MLPerf Tiny's DS-CNN on real keywords: every cut, auxiliary head against plain classifier.

Needs a folder with ``checkpoints/kws_dscnn_mlperf.safetensors`` and ``kws_sc2_mfcc_int8.npz`` (MFCC features of
Speech Commands v2). The task is the four words yes, no, up, down with the data set's own speaker-disjoint
split: heads are trained on split 0, every choice is made on split 1, and split 2 is read once, at the end. The
pretrained network's score is its argmax among those four of its twelve words.

    python benchmarks/depth_pruning.py --data FOLDER --output benchmarks/results/depth_pruning.json --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sigmab_plugin
from sigmab_plugin.models import load_mlperf_ds_cnn
from sigmab_plugin.techniques.depth_pruning import (
    DepthPruningConfig,
    SweepResult,
    enumerate_cuts,
    export_int8,
    from_sweep,
    pareto,
    sweep,
)
from sigmab_plugin.techniques.depth_pruning.sweep import measure_latency

WORDS = ("down", "no", "up", "yes")
LATENCY_ROUNDS = 9

#: Sweeps: what differs from the paper's settings (frozen, stages of 32 and 16 channels, 20 + 10 + 20 epochs of a
#: smaller training set). ``cuts`` limits the sweep that trains all layers, which costs most.
VARIANTS: dict[str, dict[str, Any]] = {
    "auxiliary head, kept layers frozen": {"cache_features": True, "epochs": (6, 2, 4)},
    "classifier only, kept layers frozen": {"cache_features": True, "epochs": (6, 2, 4), "head_widths": ()},
    "auxiliary head, all layers trained": {
        "freeze": False,
        "epochs": (4, 2, 4),
        "cuts": ("block1", "block2", "block3"),
    },
}


class Keywords:
    """The three splits of the four words as batches of 32, in memory."""

    def __init__(self, file: Path, limit: int | None, seed: int) -> None:
        archive = np.load(file)
        scale, zero = float(archive["scale"]), float(archive["zero_point"])
        words = [str(word) for word in archive["words"]]
        self.columns = [words.index(word) for word in WORDS]
        values = (archive["yesnoupdown_x"].astype(np.float32) - zero) * scale
        targets = np.searchsorted(np.array(self.columns), archive["yesnoupdown_y"])
        self.splits: list[tuple[torch.Tensor, torch.Tensor]] = []
        for number in range(3):
            rows = np.flatnonzero(archive["yesnoupdown_split"] == number)
            rows = np.random.default_rng(seed).permutation(rows)[:limit]
            self.splits.append(
                (
                    torch.from_numpy(values[rows]).unsqueeze(1),
                    torch.from_numpy(targets[rows].astype(np.int64)),
                )
            )

    def train(self, seed: int) -> Shuffled:
        return Shuffled(*self.splits[0], seed)

    def accuracy(self, net: nn.Module, split: int) -> float:
        values, targets = self.splits[split]
        net.eval()
        with torch.no_grad():
            logits = torch.cat([net(part) for part in values.split(512)])
        return float((logits.argmax(1) == targets).double().mean())


class Shuffled:
    """Batches of 32 in a new order every epoch, the same for every network of one seed."""

    def __init__(self, values: torch.Tensor, targets: torch.Tensor, seed: int) -> None:
        self.values, self.targets, self.seed = values, targets, seed

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        self.seed += 1
        order = torch.randperm(len(self.values), generator=generator)
        for rows in order.split(32):
            if len(rows) > 1:
                yield self.values[rows], self.targets[rows]


def four_words(model: nn.Module, columns: list[int]) -> nn.Module:
    """The pretrained network with the four rows of its classifier."""
    clone = copy.deepcopy(model)
    old = clone.fc
    clone.fc = nn.Linear(old.in_features, len(columns))
    with torch.no_grad():
        clone.fc.weight.copy_(old.weight[columns])
        clone.fc.bias.copy_(old.bias[columns])
    return clone.eval()


def describe(
    result: SweepResult, dense: nn.Module, data: Keywords, directory: Path, max_drop: float
) -> dict[str, Any]:
    """Rows with test accuracy, int8 size and latencies taken in turns; the choice is made from validation alone."""
    calibration = [values for values, _ in zip(data.splits[0][0].split(64), range(8), strict=False)]
    example = data.splits[0][0][:2]
    nets = [from_sweep(directory, row.cut, dense, example) for row in result.rows]
    latencies = [[measure_latency(net, example[:1]) for net in nets] for _ in range(LATENCY_ROUNDS)]
    # The quietest round of each network: what the machine did besides adds time and never takes any away.
    timed = [
        replace(row, latency_ms=min(times))
        for row, times in zip(result.rows, zip(*latencies, strict=True), strict=True)
    ]
    front = {row.cut for row in pareto(timed)}
    chosen = result.smallest(max_drop=max_drop)
    rows = []
    for row, net in zip(timed, nets, strict=True):
        written = export_int8(net, directory / f"{row.cut or 'dense'}.onnx", calibration_data=calibration)
        rows.append(
            {
                **asdict(row),
                "pareto": row.cut in front,
                "chosen": row.cut == chosen.cut,
                "test_accuracy": data.accuracy(net, 2),
                "int8_test_accuracy": int8_accuracy(written.path, data),
                "int8_onnx_bytes": written.file_bytes,
                "float_onnx_bytes": written.float_file_bytes,
            }
        )
    return {"chosen": chosen.cut, "rows": rows}


def int8_accuracy(path: Path, data: Keywords) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values, targets = data.splits[2]
    name = session.get_inputs()[0].name
    predicted = [session.run(None, {name: part.numpy()})[0].argmax(1) for part in values.split(512)]
    return float((np.concatenate(predicted) == targets.numpy()).mean())


def one_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All sweeps of one seed: of the clips that are drawn, the heads, and the order of batches."""
    torch.manual_seed(seed)
    data = Keywords(arguments.data / "kws_sc2_mfcc_int8.npz", arguments.limit, seed)
    values, targets = data.splits[0]
    data.splits[0] = (values[: arguments.train_clips], targets[: arguments.train_clips])
    model, _ = load_mlperf_ds_cnn(arguments.data / "checkpoints" / "kws_dscnn_mlperf.safetensors")
    dense = four_words(model, data.columns)
    sweeps = {}
    for name, variant in VARIANTS.items():
        options = {key: value for key, value in variant.items() if key != "cuts"}
        finished: list[str] = []
        config = DepthPruningConfig(**{**options, "seed": seed})
        folder = f"{name.replace(' ', '_').replace(',', '')}-{seed}-{len(data.splits[0][0])}"
        for cut in variant.get("cuts") or [cut.name for cut in enumerate_cuts(dense, data.splits[0][0][:2])]:
            # One call per cut, so that each sees the same order of batches, interrupted or not.
            result = sweep(
                dense,
                data.splits[0][0][:2],
                train_data=data.train(seed),
                validate=lambda net: data.accuracy(net, 1),
                config=config,
                cuts=[*finished, cut],
                directory=arguments.work / folder,
            )
            finished.append(cut)
            print(f"seed {seed}, {name}: {result.rows[-1]}", flush=True)
        described = describe(result, dense, data, arguments.work / folder, arguments.max_drop)
        sweeps[name] = {"config": config.to_dict(), **described}
    clips = {name: len(t) for name, (_, t) in zip(("train", "validation", "test"), data.splits, strict=True)}
    return {"seed": seed, "clips": clips, "sweeps": sweeps}


def combined(parts: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of every sweep over the seeds: means, the standard deviation of accuracies, how often on the front."""
    sweeps = {}
    for name in VARIANTS:
        rows = []
        for cells in zip(*(part["sweeps"][name]["rows"] for part in parts), strict=True):
            row = {key: cells[0][key] for key in ("cut", "parameters", "statistics", "macs", "stored_bytes")}
            row["latency_ms"] = min(cell["latency_ms"] for cell in cells)
            for key in ("score", "test_accuracy", "int8_test_accuracy", "int8_onnx_bytes"):
                values = [cell[key] for cell in cells]
                row[key] = statistics.fmean(values)
                row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
            for key in ("pareto", "chosen"):
                row[key] = sum(cell[key] for cell in cells)
            rows.append(row)
        sweeps[name] = rows
    return sweeps


def table(sweeps: dict[str, list[dict[str, Any]]], seeds: int) -> str:
    """Markdown, a line per cut; the classifier alone and all layers trained as columns beside the head's."""
    head, plain, whole = ({row["cut"]: row for row in rows} for rows in sweeps.values())

    def accuracy(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        deviation = row["test_accuracy_sd"]
        return f"{100 * row['test_accuracy']:.2f}" + (
            "" if deviation is None else f" ± {100 * deviation:.2f}"
        )

    lines = [
        "| kept up to | parameters | MACs | ms | auxiliary head | all layers trained | classifier only "
        "| int8 ONNX, kB | Pareto | chosen |",
        "|---|" + "---:|" * 9,
    ]
    for cut in [*(cut for cut in head if cut), ""]:
        row = head[cut]
        cells = [
            cut or "all (the network as given)",
            f"{row['parameters']:,}".replace(",", " "),
            f"{row['macs'] / 1e6:.2f} M",
            f"{row['latency_ms']:.2f}",
            accuracy(row),
            accuracy(whole.get(cut)) if cut else "",
            accuracy(plain[cut]) if cut else "",
            f"{row['int8_onnx_bytes'] / 1000:.1f}",
            f"{row['pareto']} of {seeds}",
            f"{row['chosen']} of {seeds}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache/depth_pruning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="clips of every split, for a trial run")
    parser.add_argument("--train-clips", type=int, help="clips to train heads on (default: all 12 440)")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = []
    for seed in arguments.seeds:
        parts.append(one_seed(arguments, seed))
        sweeps = combined(parts)
        content = {
            "benchmark": "depth_pruning",
            "model": "MLPerf Tiny DS-CNN, classifier rows of four words",
            "data": {
                "task": "yes, no, up, down of Speech Commands v2; speakers are disjoint across the splits",
                "clips": parts[0]["clips"],
                "choices": "on validation; test read once per network",
            },
            "published": "block 2: -28 % parameters, -28 % MACs, -1.06 points (12 words, arXiv 2204.10546)",
            "command": "python " + " ".join(sys.argv).replace(str(arguments.data), "FOLDER"),
            "seeds": [part["seed"] for part in parts],
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "sigmab_plugin": sigmab_plugin.__version__,
            },
            "latency": f"batch 1, {arguments.threads} thread(s), {platform.machine()}, PyTorch eager; median of 30, "
            f"the least of {LATENCY_ROUNDS} rounds",
            "sweeps": sweeps,
            "table": table(sweeps, len(parts)),
            "per_seed": parts,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print(content["table"])


if __name__ == "__main__":
    main()
