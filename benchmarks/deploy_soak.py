"""Soak test of the runner: concurrent callers, random eviction, artefacts deleted and damaged meanwhile.

    python benchmarks/deploy_soak.py --cache /tmp/soak --out benchmarks/results/deploy_soak.json [--full]

Every answer is compared with hard routing in torch; an error must name a node that was damaged at the time.
Exit code 1 if an answer was wrong, an error was unexplained, or memory grew.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy_networks import balance
from sigmab_plugin import SigmaBConfig, SigmaBPruner
from sigmab_plugin.deploy import Runner, export, read_manifest
from sigmab_plugin.errors import FormatError
from sigmab_plugin.models import cifar_resnet50
from sigmab_plugin.tree import SigmaBNet

INPUTS = 64


@dataclass
class Tally:
    """What the callers saw."""

    answers: int = 0
    faults: int = 0
    wrong: list[float] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Saboteur:
    """Damages one artefact after the other and restores it; knows since when which one is whole."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.damaged: list[tuple[str, float, float]] = []
        self.whole = {
            node.path: (node.weights.file, node.program.file) for node in read_manifest(directory).nodes
        }

    def __enter__(self) -> Saboteur:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def explains(self, path: str, start: float, end: float) -> bool:
        return any(p == path and begin <= end and start <= until for p, begin, until in tuple(self.damaged))

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            path = self._random.choice([p for p in self.whole if p])
            file = self._directory / self._random.choice(self.whole[path])
            content = file.read_bytes()
            begin = time.perf_counter()
            # Open-ended while it lasts: a fault may be seen before the repair is.
            self.damaged.append((path, begin, float("inf")))
            kind = self._random.choice(("delete", "truncate", "flip"))
            if kind == "delete":
                file.unlink()
            elif kind == "truncate":
                _replace(file, content[: len(content) // 2])
            else:
                altered = bytearray(content)
                altered[self._random.randrange(len(altered))] ^= 0x10
                _replace(file, bytes(altered))
            self._stop.wait(0.02)
            _replace(file, content)
            self.damaged[-1] = (path, begin, time.perf_counter())


def _replace(file: Path, content: bytes) -> None:
    """A new file under the old name, as a download would put it there; a read under way keeps the old one."""
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.rename(file)


def network() -> SigmaBNet:
    torch.manual_seed(0)
    dense = cifar_resnet50(width=0.125).eval()
    x = torch.randn(32, 3, 32, 32)
    net: SigmaBNet = SigmaBPruner(
        dense, (x[:2],), calibration_data=[x], config=SigmaBConfig.preset("resnet50", projection_dim=16)
    ).step()
    balance(net.eval(), torch.randn(64, 3, 32, 32))
    return net


def rss() -> int:
    return 1024 * int(re.findall(r"^Rss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[0])


def call(
    runner: Runner,
    inputs: np.ndarray,
    expected: np.ndarray,
    count: int,
    seed: int,
    tally: Tally,
    foe: Saboteur,
) -> None:
    rng = np.random.default_rng(seed)
    for number in range(count):
        index = rng.integers(0, INPUTS, 1 if rng.random() < 0.9 else 4)
        start = time.perf_counter()
        try:
            logits = runner(inputs[index])
        except FormatError as error:
            named = re.search(r"node '([^']+)'", str(error))
            explained = named is not None and foe.explains(named[1], start, time.perf_counter())
            with tally.lock:
                tally.faults += 1
                if not explained:
                    tally.unexplained.append(str(error))
        else:
            error_size = float(np.abs(logits - expected[index]).max())
            with tally.lock:
                tally.answers += 1
                if error_size > 1e-4:
                    tally.wrong.append(error_size)
        if number % 50 == 0 and rng.random() < 0.5:
            runner.drop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true", help="100 000 inferences instead of 2 000")
    parser.add_argument("--inferences", type=int, help="another number")
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--backend", default="onnxruntime", choices=("onnxruntime", "torch"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    total = args.inferences or (100_000 if args.full else 2_000)
    net = network()
    inputs = torch.randn(INPUTS, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = torch.cat([net(x[None]) for x in inputs]).numpy()
        leaves = net.route(inputs)
    directory = args.cache / f"soak-{args.backend}"
    form = {"onnxruntime": "onnx", "torch": "torch"}[args.backend]
    manifest = export(net, inputs[:2], directory, format=form, overwrite=True)
    budget = int(1.3 * max(manifest.path_bytes().values()))
    tally = Tally()
    samples: list[tuple[int, int]] = []
    began = time.perf_counter()
    options: dict[str, Any] = {"budget_bytes": budget, "prefetch": "both", "threads": 1}
    with Runner(directory, backend=args.backend, **options) as runner, Saboteur(directory, seed=1) as foe:
        threads = [
            threading.Thread(
                target=call, args=(runner, inputs.numpy(), expected, total // args.callers, seed, tally, foe)
            )
            for seed in range(args.callers)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            samples.append((tally.answers + tally.faults, rss()))
            if len(samples) % 150 == 0:
                done, memory = samples[-1]
                print(
                    f"{done} of {total}, {memory >> 20} MB, {time.perf_counter() - began:.0f} s", flush=True
                )
        statistics = runner.statistics()
    steady = np.array([s for s in samples if s[0] > total // 3], dtype=float)
    slope = float(np.polyfit(steady[:, 0], steady[:, 1], 1)[0]) if len(steady) > 2 else 0.0
    result = {
        "inferences": tally.answers + tally.faults,
        "callers": args.callers,
        "backend": args.backend,
        "leaves_reached": len(leaves.unique()),
        "seconds": time.perf_counter() - began,
        "answers": tally.answers,
        "wrong": len(tally.wrong),
        "faults": tally.faults,
        "unexplained": tally.unexplained[:5],
        "times_damaged": len(foe.damaged),
        "evictions": statistics.evictions,
        "budget": budget,
        "peak_counted": statistics.peak_resident_bytes,
        "rss_slope_bytes_per_inference": slope,
        "rss_first_last": [samples[0][1], samples[-1][1]],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    # A leak of one small tensor per load would be hundreds of bytes; allocator noise over a short run is more.
    leaking = total >= 20_000 and slope * total > 16 << 20
    return int(bool(tally.wrong or tally.unexplained or leaking or statistics.peak_resident_bytes > budget))


if __name__ == "__main__":
    sys.exit(main())
