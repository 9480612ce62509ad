"""Depth pruning of MLPerf Tiny's DS-CNN on real keywords: every cut, auxiliary head against plain classifier.

Needs a folder with ``checkpoints/kws_dscnn_mlperf.safetensors`` and ``kws_sc2_mfcc_int8.npz`` (MFCC features of
Speech Commands v2). The task is the four words yes, no, up, down with the data set's own speaker-disjoint
split: heads are trained on split 0, every choice is made on split 1, and split 2 is read once, at the end. The
pretrained network's score is its argmax among those four of its twelve words.

    python benchmarks/depth_pruning.py --data FOLDER --output benchmarks/results/depth_pruning.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from dataclasses import asdict
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
    sweep,
)

WORDS = ("down", "no", "up", "yes")

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
    """Rows with test accuracy and int8 size; the choice is made from validation alone."""
    chosen = result.smallest(max_drop=max_drop)
    front = {row.cut for row in result.pareto()}
    calibration = [values for values, _ in zip(data.splits[0][0].split(64), range(8), strict=False)]
    example = data.splits[0][0][:2]
    rows = []
    for row in result.rows:
        net = from_sweep(directory, row.cut, dense, example)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/cache/depth_pruning"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="clips of every split, for a trial run")
    parser.add_argument("--train-clips", type=int, help="clips to train heads on (default: all 12 440)")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    start = time.time()
    data = Keywords(arguments.data / "kws_sc2_mfcc_int8.npz", arguments.limit, arguments.seed)
    values, targets = data.splits[0]
    data.splits[0] = (values[: arguments.train_clips], targets[: arguments.train_clips])
    model, _ = load_mlperf_ds_cnn(arguments.data / "checkpoints" / "kws_dscnn_mlperf.safetensors")
    dense = four_words(model, data.columns)
    sweeps = {}
    for name, variant in VARIANTS.items():
        options = {key: value for key, value in variant.items() if key != "cuts"}
        finished: list[str] = []
        config = DepthPruningConfig(**{**options, "seed": arguments.seed})
        directory = (
            arguments.work
            / f"{name.replace(' ', '_').replace(',', '')}-{arguments.seed}-{len(data.splits[0][0])}"
        )
        for cut in variant.get("cuts") or [cut.name for cut in enumerate_cuts(dense, data.splits[0][0][:2])]:
            # One call per cut, so that each sees the same order of batches, interrupted or not.
            result = sweep(
                dense,
                data.splits[0][0][:2],
                train_data=data.train(arguments.seed),
                validate=lambda net: data.accuracy(net, 1),
                config=config,
                cuts=[*finished, cut],
                directory=directory,
            )
            finished.append(cut)
        sweeps[name] = {
            "config": config.to_dict(),
            **describe(result, dense, data, directory, arguments.max_drop),
        }
        content = {
            "benchmark": "depth_pruning",
            "model": "MLPerf Tiny DS-CNN, classifier rows of four words",
            "data": {
                "task": "yes, no, up, down of Speech Commands v2; speakers are disjoint across the splits",
                "clips": dict(
                    zip(("train", "validation", "test"), (len(t) for _, t in data.splits), strict=True)
                ),
                "choices": "on validation; test read once per network",
            },
            "published": "block 2: -28 % parameters, -28 % MACs, -1.06 points (12 words, arXiv 2204.10546)",
            "command": "python " + " ".join(sys.argv).replace(str(arguments.data), "FOLDER"),
            "seed": arguments.seed,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "sigmab_plugin": sigmab_plugin.__version__,
            },
            "latency": f"batch 1, {arguments.threads} thread(s), {platform.machine()}, PyTorch eager, median",
            "seconds": round(time.time() - start, 1),
            "sweeps": sweeps,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(sweeps, indent=1))


if __name__ == "__main__":
    main()
