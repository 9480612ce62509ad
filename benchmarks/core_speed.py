"""Speed of the core as ratios in one run, each beside its floor (one line a claim).

    python benchmarks/core_speed.py [--samples 64] [--repeats 5] [--threads 2] [--json FILE]

Weights are random: times do not depend on them. Dense and restructured calls are interleaved and the
median of the ratios is reported, so that a busy machine disturbs both alike.

At batch 256 an activation takes hundreds of megabytes. glibc gives such blocks back to the system after each layer
and takes them anew, page by page, which costs about as much time as the arithmetic, in the shared backbone above
all. The claim is about the arithmetic, so it is measured with an allocator that keeps its memory
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_); the ratio with glibc's defaults is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, __version__
from sigmab_plugin.counting import macs
from sigmab_plugin.models import cifar_resnet50
from sigmab_plugin.tree.build import restructure
from sigmab_plugin.tree.clustering import spherical_kmeans
from sigmab_plugin.tree.prepare import prepare


@dataclass(frozen=True)
class Row:
    claim: str
    measured: float
    floor: float
    limit: float | None

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.measured <= self.limit


KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _ratio(candidate: Callable[[], Any], reference: Callable[[], Any], repeats: int) -> float:
    candidate()
    reference()
    ratios = []
    for number in range(repeats):
        # Alternate which goes first.
        if number % 2:
            one, two = _seconds(candidate), _seconds(reference)
        else:
            two, one = _seconds(reference), _seconds(candidate)
        ratios.append(one / two)
    return statistics.median(ratios)


def restructuring(samples: int, repeats: int) -> Row:
    """Restructuring against the forward passes that it must make: one per level."""
    model = cifar_resnet50().eval()
    batches = [torch.randn(32, 3, 32, 32) + torch.randn(32, 3, 1, 1) for _ in range(max(1, samples // 32))]
    config = SigmaBConfig.preset("resnet50")

    def run() -> None:
        restructure(prepare(model, batches[0][:2], config=config), batches)

    def passes() -> None:
        with torch.no_grad():
            for _ in range(len(config.levels) + 1):
                for batch in batches:
                    model(batch)

    ratio = _ratio(run, passes, repeats)
    return Row(
        f"restructuring ResNet-50 over {samples} samples / levels + 1 forward passes", ratio, 1.0, 1.25
    )


def latency(net: SigmaBNet, dense: torch.nn.Module, batch: int, repeats: int) -> Row:
    """Hard routing against dense; the floor is the ratio of multiply-accumulates."""
    x = torch.randn(batch, 3, 32, 32)
    net.routing = "hard"
    floor = net.macs(x[:1]).active / macs(dense, x[:1])
    with torch.no_grad():
        ratio = _ratio(lambda: net(x), lambda: dense(x), repeats)
    return Row(f"hard routing, batch {batch} / dense", ratio, floor, floor * 1.15)


def throughput(options: argparse.Namespace) -> list[Row]:
    """Batch 256 in processes of their own, since the allocator is set up when a process starts."""
    rows = []
    for keep in (True, False):
        command = [sys.executable, __file__, "--throughput-only"]
        command += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        environment = {**plain, **(KEEP_MEMORY if keep else {})}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        row = Row(**json.loads(done.stdout))
        rows.append(row if keep else replace(row, claim=row.claim + ", glibc's defaults", limit=None))
    return rows


def clustering(repeats: int) -> list[Row]:
    """Spherical k-means, 50 000 x 128, against scikit-learn's KMeans on the same unit vectors."""
    from sklearn.cluster import KMeans

    centres = torch.randn(2, 128)
    rows = torch.nn.functional.normalize(
        torch.randn(50_000, 128) + 0.5 * centres[torch.arange(50_000) % 2], dim=1
    )
    ours: list[float] = []
    theirs: list[float] = []

    def mine() -> None:
        ours.append(spherical_kmeans(rows).objective)

    def sklearn() -> None:
        fitted = KMeans(2, n_init=10, random_state=0).fit(rows.numpy())
        centroids = torch.nn.functional.normalize(torch.from_numpy(fitted.cluster_centers_), dim=1)
        theirs.append(float((rows @ centroids.T.float()).max(dim=1).values.mean()))

    ratio = _ratio(mine, sklearn, repeats)
    loss = statistics.mean(theirs) - statistics.mean(ours)
    return [
        Row("spherical k-means / scikit-learn KMeans, time, 10 restarts each", ratio, 0.0, 1.0),
        Row("objective lost against scikit-learn (negative: ours is better)", loss, 0.0, 1e-6),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--throughput-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dense = cifar_resnet50().eval()
    data = [torch.randn(16, 3, 32, 32) + torch.randn(16, 3, 1, 1) for _ in range(2)]
    net = (
        SigmaBPruner(dense, data[0], config=SigmaBConfig.preset("resnet50"), calibration_data=data)
        .step()
        .eval()
    )
    if options.throughput_only:
        print(json.dumps(asdict(latency(net, dense, 256, options.repeats))))
        return
    rows = [
        restructuring(options.samples, options.repeats),
        latency(net, dense, 1, 4 * options.repeats),
        *throughput(options),
        *clustering(options.repeats),
    ]
    width = max(len(row.claim) for row in rows)
    print(f"{'claim':<{width}}  {'measured':>9}  {'floor':>7}  {'limit':>7}")
    for row in rows:
        verdict = {True: "met", False: "NOT MET", None: "no claim"}[row.met]
        limit = f"{row.limit:>7.3f}" if row.limit is not None else f"{'':>7}"
        print(f"{row.claim:<{width}}  {row.measured:>9.4f}  {row.floor:>7.3f}  {limit}  {verdict}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MiB, load {os.getloadavg()[0]:.1f}")
    if options.json:
        record = {
            "command": "python benchmarks/core_speed.py",
            "options": {k: str(v) for k, v in vars(options).items() if k != "throughput_only"},
            "versions": {
                "sigmab-plugin": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "load": os.getloadavg(),
            "rows": [{**asdict(row), "met": row.met} for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
