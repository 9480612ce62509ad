"""Figure of ``deploy.py``'s JSON: latency against bandwidth, and bytes moved per inference, in ONNX Runtime.

python benchmarks/deploy_figure.py benchmarks/results/deploy.json docs/deployment.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RATES = {"50 MB/s": 50, "500 MB/s": 500, "2 GB/s": 2000}
STYLES = {
    "dense": ("0.35", "-", "o"),
    "dense, prefetch": ("0.35", "--", "o"),
    "pruned": ("tab:green", "-", "s"),
    "pruned, prefetch": ("tab:green", "--", "s"),
    "sigmab": ("tab:blue", "-", "^"),
    "sigmab, prefetch both": ("tab:blue", "--", "^"),
    "sigmab, prefetch likely": ("tab:blue", ":", "^"),
}


def main(source: Path, target: Path) -> None:
    body: dict[str, Any] = json.loads(source.read_text())
    rows = [
        row
        for row in body["rows"]
        if row["mode"].startswith("streamed") and row["backend"] == "onnxruntime" and "note" not in row
    ]
    cases = sorted({(row["case"], row["backend"]) for row in rows})
    figure, axes = plt.subplots(2, len(cases), figsize=(3.6 * len(cases), 6.4), squeeze=False)
    for column, (case, backend) in enumerate(cases):
        latency, volume = axes[0][column], axes[1][column]
        for place, (name, (colour, line, marker)) in enumerate(STYLES.items()):
            own = {
                row["mode"].removeprefix("streamed, "): row for row in rows if _is(row, case, backend, name)
            }
            points = [(RATES[label], row) for label, row in own.items()]
            if not points:
                continue
            latency.plot(
                [rate for rate, _ in points],
                [row["median_s"] * 1e3 for _, row in points],
                color=colour,
                linestyle=line,
                marker=marker,
                markersize=4,
                label=name,
            )
            middle = own.get("500 MB/s", points[0][1])
            volume.barh(place, middle["bytes"] / 1e6, color=colour, alpha=1.0 if line == "-" else 0.5)
        latency.set(xscale="log", yscale="log", xlabel="bandwidth, MB/s", title=f"{case}\n{backend}")
        volume.set(xlabel="MB read per inference (at 500 MB/s)", yticks=range(len(STYLES)))
        volume.set_ylim(-0.5, len(STYLES) - 0.5)
        volume.set_yticklabels(STYLES if column == 0 else [])
        volume.invert_yaxis()
    axes[0][0].set_ylabel("median latency, ms")
    fullest = max(axes[0], key=lambda axis: len(axis.get_lines()))  # PointNet++ has no dense network in parts
    fullest.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def _is(row: dict[str, Any], case: str, backend: str, variant: str) -> bool:
    return (row["case"], row["backend"], row["variant"]) == (case, backend, variant)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
