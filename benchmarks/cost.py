"""Time and memory of making a network and of training it, beside training the dense network.

    python benchmarks/cost.py cifar100 --data FOLDER
    python benchmarks/cost.py modelnet40 --data FOLDER

Networks, calibration samples and training are those of ``recipes/EXPERIMENT-cpu.json``, without a teacher and from
untrained weights. Times are CPU seconds of one thread, the least of some runs: a busy machine disturbs them less than
wall time, and only upwards. Making a network includes reading the calibration samples; training steps take batches
that are ready. Memory is the peak above what the process held with the data and before any network. Time and memory
are taken in processes of their own: time with an allocator that keeps its memory, memory with one that gives large
blocks back at once (MALLOC_MMAP_THRESHOLD_, glibc). Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from accuracy.arms import build_arm  # noqa: E402
from accuracy.experiments import open_experiment  # noqa: E402
from sigmab_plugin import finetune  # noqa: E402
from sigmab_plugin.report.provenance import provenance  # noqa: E402
from sigmab_plugin.tree.segments import call  # noqa: E402
from sigmab_plugin.tuning import TrainRecipe  # noqa: E402

REPAIRED: dict[str, Any] = {"repair": "least_squares", "repair_samples": 4096}
#: What is measured; how long Torch-Pruning's network takes to make says nothing, since its ratio is searched for.
NETWORKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "SigmaB": {"kind": "tree"},
    "static twin": {"kind": "twin"},
    "SigmaB, repaired": {"kind": "tree", "config": REPAIRED},
    "static twin, repaired": {"kind": "twin", "config": REPAIRED},
    "Torch-Pruning, group magnitude": {"kind": "torch_pruning", "importance": "magnitude"},
}
KEEPS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
WARMUP = 3


class Meter:
    """CPU seconds of a ``with`` block, and its peak memory in MiB above ``held`` (KiB)."""

    def __init__(self, held: int) -> None:
        self._held = held

    def __enter__(self) -> Meter:
        gc.collect()  # a traced graph has cycles
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._started = time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.process_time() - self._started
        self.mib = (_status("VmHWM") - self._held) / 1024


def _status(name: str) -> int:
    """A line of this process's status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def probe(options: argparse.Namespace) -> dict[str, float]:
    """Make one network and train it for some steps, in this process."""
    torch.set_num_threads(1)
    recipe = json.loads(_recipe_file(options).read_text())
    experiment = open_experiment(recipe, options.data, Path(options.cache))
    training = TrainRecipe(**recipe["finetune"]).replace(warmup_epochs=0.0, distillation_weight=0.0)
    batches = list(
        islice(experiment.train_loader(batch_size=training.batch_size, seed=0), options.steps + WARMUP)
    )
    example = experiment.example(2)
    call(experiment.model(0).eval(), example)  # kernels and their buffers are there from now on
    held = _status("VmRSS")
    net = dense = experiment.model(0)
    settings = NETWORKS[options.probe]
    samples = min(recipe["calibration"]["samples"], len(experiment.train))
    found: dict[str, float] = {
        "steps_per_epoch": len(experiment.train) // training.batch_size,
        "calibration_samples": samples,
        "repair_samples": min(REPAIRED["repair_samples"], samples),
    }
    with Meter(held) as making:
        if settings:
            net = build_arm(experiment, recipe, settings, dense, seed=0)
    del dense
    if settings and settings["kind"] != "torch_pruning":
        found |= {"making_seconds": round(making.seconds, 2), "making_mib": round(making.mib)}
    if "config" not in settings:  # a repaired network has the same layers
        finetune(net, batches[:WARMUP], epochs=1, recipe=training, progress=False)
        with Meter(held) as steps:
            finetune(net, batches[WARMUP:], epochs=1, recipe=training, progress=False)
        milliseconds = 1e3 * steps.seconds / len(batches[WARMUP:])
        found |= {"step_milliseconds": round(milliseconds, 1), "step_mib": round(steps.mib)}
    return found


def measure(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Every network, each figure from a process of its own."""
    rows = []
    for name in NETWORKS:
        weighed = _probed(name, arguments, GIVES_BACK)
        timed = [_probed(name, arguments, KEEPS) for _ in range(options.repeats)]
        row = {"network": name, **weighed}
        row |= {key: min(run[key] for run in timed) for key in weighed if not key.endswith("mib")}
        print(row, flush=True)
        rows.append(row)
    return rows


def _probed(name: str, arguments: list[str], allocator: dict[str, str]) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, *arguments, "--probe", name],
        env={**os.environ, "OMP_NUM_THREADS": "1", **allocator},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def _recipe_file(options: argparse.Namespace) -> Path:
    return HERE / "recipes" / f"{options.experiment}-cpu.json"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write ``cost-EXPERIMENT.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("cifar100", "modelnet40", "keywords", "digits"))
    parser.add_argument("--data", action="append", default=[], help="as for run.py")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are measured")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the least time counts")
    parser.add_argument("--cache", default=str(HERE / "cache"), help="folder of decoded data")
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the result file")
    parser.add_argument("--probe", choices=tuple(NETWORKS), help=argparse.SUPPRESS)
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    if options.probe:
        logging.getLogger("sigmab_plugin").setLevel(logging.ERROR)  # leaves may starve in so few steps
        print(json.dumps(probe(options)))
        return 0
    recipe = json.loads(_recipe_file(options).read_text())
    record = {
        "experiment": options.experiment,
        "note": recipe["note"],
        "batch_size": recipe["finetune"]["batch_size"],
        "steps": options.steps,
        "repeats": options.repeats,
        "rows": measure(options, arguments),
        "provenance": provenance(["python", "benchmarks/cost.py", options.experiment]),
    }
    target = Path(options.results) / f"cost-{options.experiment}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
