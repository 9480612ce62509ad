"""Training step of a tree against the dense network's, beside the ratio of their multiply-accumulates.

    python benchmarks/steps.py [--model cifar_resnet50] [--width 0.25] [--batch 64] [--device cpu|cuda]
                               [--amp] [--channels-last] [--clock wall|process] [--repeats 15] [--json FILE] [--check]

The steps take turns in one process, so that a busy machine disturbs all alike; medians and quartiles are reported. On
a shared CPU ``--threads 1 --clock process`` counts the work alone.

- dense: the network the tree was made from, plain loop.
- floor: backbone, every specializer and every head of the tree, cross-entropy of their mean. No routers, no eq. 8:
  what evaluating every leaf costs at the least.
- soft: the tree with eq. 8, plain loop.
- finetune: the same through ``sigmab_plugin.finetune``, its own work included.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, finetune
from sigmab_plugin import models as zoo
from sigmab_plugin.counting import macs
from sigmab_plugin.report.provenance import provenance
from sigmab_plugin.tuning import TrainRecipe

RECIPE = TrainRecipe(schedule="constant", warmup_epochs=0.0, lr=1e-3, label_smoothing=0.1)


class EveryLeaf(nn.Module):
    """Mean of the leaves' logits, nothing else computed."""

    def __init__(self, net: SigmaBNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        values = {"": net.backbone(x)}
        for key in sorted(net.specializers, key=len):
            values[key] = net.specializers[key](values[key.rpartition("_")[0]])
        return torch.stack([head(values[key]) for key, head in net.heads.items()]).mean(0)


class Turns:
    """A loader that stops before each batch until it is asked for the next step, and takes the step's time."""

    def __init__(self, batch: Any, steps: int, clock: Callable[[], float]) -> None:
        self.batch, self.steps, self.clock = batch, steps, clock
        self.times: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            started = self.clock()
            yield self.batch
            self.times.append(self.clock() - started)


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """Seconds, once the device has finished what it was given."""
    if args.clock == "process":
        return time.process_time
    if args.device == "cpu":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def plain_step(
    module: nn.Module, batch: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor], *, amp: bool
) -> Callable[[], None]:
    """One SGD step as a user would write it."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
    module.train()
    images, targets = batch

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            value = loss(images, targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def build(
    args: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, SigmaBNet, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    make = getattr(zoo, args.model)
    dense = make(args.classes, width=args.width)
    size = 224 if args.model.startswith("imagenet") else 32
    images, targets = torch.randn(args.batch, 3, size, size), torch.randint(args.classes, (args.batch,))
    config = SigmaBConfig(levels=("layer3", "layer4"), head="fc", round_to=args.round_to)
    calibration = [torch.randn(16, 3, size, size) for _ in range(4)]
    net = SigmaBPruner(dense.eval(), images[:2], calibration_data=calibration, config=config).step()
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    dense, net = (m.to(device, memory_format=layout) for m in (dense, net))
    return dense, net, (images.to(device, memory_format=layout), targets.to(device))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    dense, net, batch = build(args, device)
    every_leaf = EveryLeaf(net)
    smoothing = RECIPE.label_smoothing

    def cross_entropy(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: F.cross_entropy(module(x).float(), y, label_smoothing=smoothing)

    steps = {
        "dense": plain_step(dense, batch, cross_entropy(dense), amp=args.amp),
        "floor": plain_step(every_leaf, batch, cross_entropy(every_leaf), amp=args.amp),
        "soft": plain_step(net, batch, lambda x, y: net.loss(x, y, label_smoothing=smoothing), amp=args.amp),
    }
    times: dict[str, list[float]] = {name: [] for name in (*steps, "finetune", "finetune dense")}
    now = clock_of(args)
    inner = 3  # the loop's first step of a call warms its optimiser up
    for _ in range(args.warmup):
        for step in steps.values():
            step()
    for _ in range(args.repeats):
        for name, step in steps.items():
            started = now()
            step()
            times[name].append(now() - started)
        for name, module in (("finetune", net), ("finetune dense", dense)):
            turns = Turns(batch, inner, now)
            finetune(module, turns, epochs=1, recipe=RECIPE.replace(amp=args.amp), progress=False)
            times[name].append(statistics.median(turns.times[1:]))
    return summary(args, times, net.macs(batch[0]).total / macs(dense, batch[0]))


def summary(args: argparse.Namespace, times: dict[str, list[float]], ratio: float) -> dict[str, Any]:
    def against(name: str, base: str) -> dict[str, float]:
        # Ratio of each round, so that what slows a whole round cancels.
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(times[name], times[base], strict=True)], n=4
        )
        return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4)}

    return {
        "model": args.model,
        "width": args.width,
        "round_to": args.round_to,
        "batch": args.batch,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "amp": args.amp,
        "channels_last": args.channels_last,
        "repeats": args.repeats,
        "milliseconds": {name: round(1e3 * statistics.median(t), 3) for name, t in times.items()},
        "mac_ratio": round(ratio, 4),
        "soft_over_dense": against("soft", "dense"),
        "floor_over_dense": against("floor", "dense"),
        "soft_over_floor": against("soft", "floor"),
        "finetune_over_soft": against("finetune", "soft"),
        "finetune_dense_over_dense": against("finetune dense", "dense"),
        "soft_over_dense_relative_to_macs": round(against("soft", "dense")["median"] / ratio, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="cifar_resnet50", help="a residual network of sigmab_plugin.models"
    )
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--width", type=float, default=0.25, help="of the dense network")
    parser.add_argument("--round-to", type=int, help="widths of the tree are multiples of it")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "process"), help="process: CPU time, for a busy CPU"
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless soft / dense is within 10 %% of the MAC ratio",
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.getLogger("sigmab_plugin").setLevel(logging.ERROR)  # leaves do starve on noise
    result = measure(args)
    where = ["--json", str(args.json)]  # where the figures go is no part of how they were made
    result["provenance"] = provenance(["python", *(word for word in sys.argv if word not in where)])
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(args.check and result["soft_over_dense_relative_to_macs"] > 1.1)


if __name__ == "__main__":
    raise SystemExit(main())
