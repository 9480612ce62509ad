"""Peak memory of restructuring, beside what cannot be avoided: dense model, net, latents, one batch.

    python benchmarks/memory.py [--samples 256 1024] [--batch 32] [--json FILE] [--check]

Each figure is the peak resident memory of a fresh process above that of the same process with everything imported.
The floor is a plain forward pass over the same batches (dense model and one batch's activations) plus the bytes of
the net and of one level's latents, (N, D) float32; a second number of samples shows what grows with them. Memory
that the allocator keeps for later would blur both, so large blocks go back to the system at once
(MALLOC_MMAP_THRESHOLD_, glibc).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from sigmab_plugin import SigmaBConfig, SigmaBPruner
from sigmab_plugin.counting import storage_bytes
from sigmab_plugin.models import cifar_resnet50
from sigmab_plugin.report.provenance import provenance

MIB = 2**20


class Batches:
    """Noise with an offset per sample and channel, made batch by batch and never held; the same each time."""

    def __init__(self, samples: int, size: int) -> None:
        self.samples, self.size = samples, size

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(0, self.samples, self.size):
            offset = torch.randn(self.size, 3, 1, 1, generator=generator)
            yield torch.randn(self.size, 3, 32, 32, generator=generator) + offset


def _peak() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def probe(what: str, samples: int, size: int) -> dict[str, int]:
    """One measurement, in this process."""
    torch.manual_seed(0)
    config = SigmaBConfig.preset("resnet50")
    small = cifar_resnet50(width=1 / 16).eval()  # so that imports and kernels are no part of the difference
    SigmaBPruner(small, torch.randn(2, 3, 32, 32), config=config, calibration_data=Batches(8, 8)).step()
    start = _peak()
    dense = cifar_resnet50().eval()
    net_bytes = 0
    if what == "forward":
        with torch.no_grad():
            for batch in Batches(samples, size):
                dense(batch)
    else:
        example = next(iter(Batches(size, size)))[:2]
        net = SigmaBPruner(dense, example, config=config, calibration_data=Batches(samples, size)).step()
        net_bytes = storage_bytes(net)
    return {
        "peak": _peak() - start,
        "net": net_bytes,
        "latents": samples * config.projection_dim * 4,
    }


def measure(samples: int, size: int) -> dict[str, float]:
    """Restructuring against its floor, both in MiB."""

    def run(what: str) -> dict[str, int]:
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            __file__,
            "--probe",
            what,
            "--samples",
            str(samples),
            "--batch",
            str(size),
        ]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        found: dict[str, int] = json.loads(output)
        return found

    forward, restructured = run("forward"), run("restructure")
    floor = forward["peak"] + restructured["net"] + restructured["latents"]
    return {
        "samples": samples,
        "batch": size,
        "forward_mib": round(forward["peak"] / MIB, 1),
        "net_mib": round(restructured["net"] / MIB, 1),
        "latents_mib": round(restructured["latents"] / MIB, 2),
        "limit_mib": round(floor / MIB, 1),
        "restructuring_mib": round(restructured["peak"] / MIB, 1),
        "ratio": round(restructured["peak"] / floor, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit code 1 if a limit is exceeded")
    parser.add_argument("--probe", choices=("forward", "restructure"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        print(json.dumps(probe(options.probe, options.samples[0], options.batch)))
        return 0
    rows = [measure(samples, options.batch) for samples in options.samples]
    print(
        f"{'samples':>8} {'forward':>9} {'net':>7} {'latents':>8} {'limit':>7} {'restructuring':>14}  (MiB)"
    )
    for row in rows:
        verdict = "met" if row["ratio"] <= 1 else "NOT MET"
        print(
            f"{row['samples']:>8} {row['forward_mib']:>9} {row['net_mib']:>7} {row['latents_mib']:>8} "
            f"{row['limit_mib']:>7} {row['restructuring_mib']:>14}  {verdict}"
        )
    if options.json:
        record = {"rows": rows, "provenance": provenance(["python", "benchmarks/memory.py"])}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(options.check and any(row["ratio"] > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
