"""Deployment table in one run: bytes, memory and latency of dense, pruned and SigmaB networks.

    python benchmarks/deploy.py --cache /tmp/deploy --out benchmarks/results/deploy.json --images FOLDER

Variants are timed in turn, round after round, so that what else the machine does falls on all of them; medians
and ratios are of one run. Processor time is printed beside wall time: on a busy machine it says more (with
``--threads 1``, where no thread spins for another). Weights are random, except where answers are compared.
Streamed rows read every weight of the path for every inference over a bus of limited rate; "predicted" is
bytes / rate + the warm latency. The JSON is written after each group of rows; the same command goes on where a
killed one stopped (``--fresh`` starts anew). ``--prepare`` only exports, which takes far longer than the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy_agreement import Images, agreement
from deploy_networks import CASES, Case, balance, dense_model, prepare, sigmab_net
from deploy_points import NAME as POINTS
from deploy_points import Points, clouds, prepare_points
from deploy_timing import (
    BACKENDS,
    RATES,
    Limits,
    Row,
    Setup,
    resident_bytes,
    row,
    show,
    streamed_rows,
    timed,
    warm_rows,
)
from sigmab_plugin.deploy import Runner, export, read_manifest
from sigmab_plugin.errors import SigmaBError
from sigmab_plugin.models import cifar_resnet50

_log = logging.getLogger("deploy")

PARTS = ("table", "residency", "agreement")
VERSIONS = ("torch", "onnxruntime", "openvino", "executorch", "torch-pruning", "torch-geometric")


class Record:
    """The JSON file: groups of rows by key, written after each."""

    def __init__(self, file: Path, *, fresh: bool) -> None:
        self.file = file
        self.body: dict[str, Any] = {"machine": {}, "counts": {}, "rows": [], "memory": [], "agreement": []}
        if file.exists() and not fresh:
            self.body.update(json.loads(file.read_text()))

    def rows(self, **wanted: str) -> list[Row]:
        return [r for r in self.body["rows"] if all(r[key] == value for key, value in wanted.items())]

    def group(self, case: str, backend: str, mode: str, make: Callable[[], list[Row]]) -> None:
        """Run ``make`` unless its rows are there; an error becomes a row that says why."""
        if self.rows(case=case, backend=backend, mode=mode):
            return
        begin = time.perf_counter()
        try:
            found = make()
        except Exception as error:  # five runtimes: whatever one of them raises is its rows' note
            if not isinstance(error, SigmaBError):
                _log.exception("%s %s %s failed", case, backend, mode)
            note = str(error).partition("\n")[0]
            found = [{"case": case, "backend": backend, "variant": "all", "mode": mode, "note": note}]
        show(found)
        _log.info("%s %s %s: %.0f s", case, backend, mode, time.perf_counter() - begin)
        self.body["rows"].extend(found)
        self.write()

    def write(self) -> None:
        self.body["goals"] = goals(self.body)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.body, indent=1) + "\n")
        partial.replace(self.file)


def importable(backends: Sequence[str]) -> list[str]:
    """Those whose export and runtime are installed."""
    found = []
    for backend in backends:
        try:
            __import__({"openvino": "openvino", "executorch": "executorch.runtime"}.get(backend, "torch"))
        except ImportError:
            continue
        found.append(backend)
    return found


def image_rows(case: Case, record: Record, args: argparse.Namespace) -> None:
    usable = importable(args.backends)
    formats = list(dict.fromkeys(BACKENDS[b] for b in usable))
    record.body["counts"][case.name] = prepare(case, args.cache, formats)
    inputs = list(np.random.default_rng(0).standard_normal((32, 1, *case.shape), np.float32))
    for backend in args.backends:
        setup = Setup(case.name, args.cache / case.name, backend, inputs, args.threads)
        if args.prepare:
            if backend == "torch-compiled":  # fills the compiler's cache
                show(warm_rows(setup, Limits(1, 0, fewest=1)))
            continue
        table(setup, record, args, streamed=backend != "torch-compiled")


def table(setup: Setup, record: Record, args: argparse.Namespace, *, streamed: bool) -> None:
    """Warm rows, then a group per rate, of one network on one backend."""
    limits = Limits(args.rounds, args.seconds)
    case, backend = setup.case, setup.backend
    record.group(case, backend, "warm", lambda: warm_rows(setup, limits))
    warm = record.rows(case=case, backend=backend, mode="warm")
    if not streamed or "note" in warm[0]:
        return
    for label in RATES:
        record.group(
            case, backend, f"streamed, {label}", lambda label=label: streamed_rows(setup, label, limits, warm)
        )


def point_rows(record: Record, args: argparse.Namespace) -> None:
    formats = tuple(dict.fromkeys(BACKENDS[b] for b in importable(args.backends)))
    points = prepare_points(args.cache, formats)
    record.body["counts"][POINTS] = points.counts
    if args.prepare:
        print(json.dumps({"whole": points.whole, "tails": points.tails}, indent=1))
        return
    inputs = [clouds(1, 10 + seed) for seed in range(16)]
    for backend in args.backends:
        form = BACKENDS[backend]
        if backend.startswith("torch"):
            compiled = backend == "torch-compiled"
            record.group(POINTS, backend, "warm", lambda c=compiled: whole_points(points, inputs, args, c))
            if form in points.whole:
                note(record, backend, "split form", points.whole[form])
            continue
        if form in points.whole:
            note(record, backend, "whole", points.whole[form])
        if form in points.tails:
            note(record, backend, "tails", points.tails[form])
            continue
        setup = Setup(POINTS, args.cache / POINTS, backend, inputs, args.threads, points.backbones)
        table(setup, record, args, streamed=True)


def whole_points(points: Points, inputs: list[Any], args: argparse.Namespace, compiled: bool) -> list[Row]:
    """The networks themselves in torch, hard routing."""
    variants: dict[str, Callable[[Any], Any]] = {}
    for name, model in (("dense", points.dense), ("pruned", points.pruned), ("sigmab", points.net)):
        called = torch.compile(model) if compiled else model
        variants[name] = lambda x, called=called: called(*x)
    with torch.inference_mode():
        for name, variant in variants.items():
            for x in inputs[: 16 if compiled and name == "sigmab" else 2]:
                try:
                    variant(x)
                except Exception as error:  # whatever the compiler raises is the row's note
                    raise SigmaBError(f"{name}: {type(error).__name__}: {str(error).strip()}") from error
        times = timed(variants, inputs, Limits(args.rounds, args.seconds))
    backend = "torch-compiled" if compiled else "torch"
    return [row(POINTS, backend, name, "warm", t, times["dense"]) for name, t in times.items()]


def note(record: Record, backend: str, mode: str, reason: str) -> None:
    def refuse() -> list[Row]:
        raise SigmaBError(reason)

    record.group(POINTS, backend, mode, refuse)


def residency_bundle(args: argparse.Namespace) -> Path:
    """The network of :func:`residency`: narrower, so that 10 000 inferences take minutes."""
    small = CASES["resnet50-32"]
    build = functools.partial(cifar_resnet50, 100, width=args.residency_width)
    case = Case(small.name, build, small.shape, small.calibration_shape)
    directory: Path = args.cache / f"residency-{args.residency_width}"
    if not directory.exists():
        net = sigmab_net(case, dense_model(case))
        balance(net, torch.randn(256, *case.shape, generator=torch.Generator().manual_seed(3)))
        export(net, torch.randn(2, *case.shape), directory, format="onnx", layout="native")
    return directory


def residency(args: argparse.Namespace) -> Row:
    """Memory over many random inputs inside a budget, as the runner counts it and as the system sees it."""
    case, directory = CASES["resnet50-32"], residency_bundle(args)
    rng = np.random.default_rng(0)
    began = time.perf_counter()
    budget = int(1.5 * max(read_manifest(directory).path_bytes().values()))
    with Runner(directory, backend="onnxruntime", budget_bytes=budget, threads=1) as runner:
        for _ in range(64):  # every session built, every scratch buffer allocated
            runner(rng.standard_normal((1, *case.shape), np.float32))
        runner.drop()
        empty = resident_bytes()
        runner.reset_statistics()
        grown = []
        for number in range(args.residency):
            runner(rng.standard_normal((1, *case.shape), np.float32))
            if number % 10 == 0:
                grown.append(resident_bytes() - empty)
        stats = runner.statistics()
    return {
        "case": case.name,
        "width": args.residency_width,
        "inferences": args.residency,
        "seconds": time.perf_counter() - began,
        "budget": budget,
        "peak_counted": stats.peak_resident_bytes,
        "peak_rss_growth": max(grown),
        "median_rss_growth": float(np.median(grown)),
        "counted_to_budget": stats.peak_resident_bytes / budget,
        "rss_to_budget": max(grown) / budget,
        "switch_rate": stats.switch_rate,
        "evictions": stats.evictions,
        "leaf_counts": stats.leaf_counts,
        "bytes_per_inference": stats.bytes_per_inference,
        "latency_s": [stats.latency_p50, stats.latency_p95, stats.latency_p99],
    }


def goals(body: dict[str, Any]) -> list[Row]:
    """Each goal beside what was measured, met or not."""
    found: list[Row] = []

    def goal(what: str, case: str, measured: float, limit: float) -> None:
        found.append(
            {"goal": what, "case": case, "measured": measured, "limit": limit, "met": measured <= limit}
        )

    for r in body["rows"]:
        if "note" in r:
            continue
        where = f"{r['case']}, {r['backend']}"
        if r["variant"] == "sigmab":
            if r["mode"] == "warm":
                goal("warm, split form / dense", where, r["ratio"], 0.75)
                goal("warm, split form / dense, processor time", where, r["ratio_of_processor"], 0.75)
            else:
                counts = body["counts"][r["case"]]["sigmab"]
                # A backbone outside the bundle is never read.
                active = 4 * (counts["parameters"] - counts.get("backbone", 0))
                goal(f"bytes read / active parameter bytes, {r['mode']}", where, r["bytes"] / active, 1.02)
        if r["mode"] == "streamed, 500 MB/s":
            if r["variant"] == "sigmab":
                goal("streamed at 500 MB/s / dense", where, r["ratio"], 0.45)
            elif r["variant"].startswith("sigmab, prefetch"):
                goal(f"streamed at 500 MB/s with {r['variant'][8:]} / dense", where, r["ratio"], 0.42)
    for r in body["memory"]:
        goal("resident / budget", r["case"], r["rss_to_budget"], 1.05)
    for r in body["agreement"]:
        if "note" not in r:
            goal("largest difference from torch", f"{r['case']}, {r['backend']}", r["difference"], 1e-4)
    return found


def machine(args: argparse.Namespace) -> dict[str, Any]:
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average": list(os.getloadavg()),
        "versions": versions,
        "rounds": args.rounds,
        "seconds": args.seconds,
    }


def parser() -> argparse.ArgumentParser:
    names = [*CASES, POINTS]
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--cache", type=Path, required=True, help="where exported bundles are kept")
    result.add_argument("--out", type=Path, required=True, help="JSON with all figures")
    result.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    result.add_argument("--cases", nargs="+", default=names, choices=names)
    result.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    result.add_argument("--rounds", type=int, default=40, help="timings of each variant, at most")
    result.add_argument(
        "--seconds", type=float, default=5.0, help="a group of rows ends after this (3 rounds at least)"
    )
    result.add_argument("--threads", type=int, default=2)
    result.add_argument("--residency", type=int, default=10_000, help="inferences inside a budget")
    result.add_argument("--residency-width", type=float, default=0.5, help="width of the network for it")
    result.add_argument("--images", type=Path, help="32x32 images: 1 000 answers are compared with torch's")
    result.add_argument("--weights", type=Path, help="trained cifar_resnet50 for --images (safetensors)")
    result.add_argument("--width", type=float, default=1.0, help="its width")
    result.add_argument(
        "--prepare", action="store_true", help="export and compile what is missing, then stop"
    )
    result.add_argument("--fresh", action="store_true", help="forget the rows that --out holds already")
    return result


def main() -> None:
    args = parser().parse_args()
    logging.basicConfig(level=logging.WARNING)
    _log.setLevel(logging.INFO)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(args.cache / "inductor"))
    torch.set_num_threads(args.threads)
    record = Record(args.out, fresh=args.fresh)
    record.body["machine"] = machine(args)
    if "table" in args.parts:
        for name in args.cases:
            if name == POINTS:
                point_rows(record, args)
            else:
                image_rows(CASES[name], record, args)
    if args.prepare:
        residency_bundle(args)
        return
    if "residency" in args.parts and args.residency and not record.body["memory"]:
        record.body["memory"] = [residency(args)]
        print(json.dumps(record.body["memory"][0]))
        record.write()
    if "agreement" in args.parts and args.images:
        images = Images(args.images, args.weights, args.width)
        done = {r["backend"] for r in record.body["agreement"]}
        # Compiled torch runs the programs of torch; groups of all sizes would compile for many minutes.
        missing = [b for b in args.backends if b not in done and b != "torch-compiled"]
        for found in agreement(images, args.cache, missing, args.threads) if missing else ():
            print(json.dumps(found))
            record.body["agreement"].append(found)
            record.write()
    record.write()
    for entry in record.body["goals"]:
        word = "met" if entry["met"] else "NOT met"
        print(f"{entry['measured']:.3g} (goal {entry['limit']}) {word}: {entry['goal']} [{entry['case']}]")


if __name__ == "__main__":
    main()
