"""Deployment table in one run: bytes, memory and latency of dense, pruned and SigmaB networks.

    python benchmarks/deploy.py --cache /tmp/deploy --out benchmarks/results/deploy.json

Variants are timed in turn, round after round, so that what else the machine does falls on all of them; medians
and ratios are of one run. Processor time is printed beside wall time: on a busy machine it says more (with
``--threads 1``, where no thread spins for another). Weights are random (see ``deploy_networks``). Streamed rows
read every weight of the path for every inference over a bus of limited rate; "predicted" is bytes / rate + the
warm latency.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy_networks import CASES, Case, prepare
from sigmab_plugin.deploy import Runner, read_manifest
from sigmab_plugin.deploy.tracing import quantile

_log = logging.getLogger("deploy")

BACKENDS = {"onnxruntime": "onnx", "openvino": "openvino", "torch": "torch"}
RATES = {"50 MB/s": 50e6, "500 MB/s": 500e6, "2 GB/s": 2e9}
Row = dict[str, Any]


Times = list[tuple[float, float]]


def timed(
    variants: dict[str, Callable[[np.ndarray], Any]], inputs: np.ndarray, rounds: int
) -> dict[str, Times]:
    """(Wall, processor) seconds of each variant, interleaved; the order changes from round to round."""
    times: dict[str, Times] = {name: [] for name in variants}
    order = list(variants)
    for number in range(rounds):
        x = inputs[number % len(inputs)][None]
        for name in order[number % len(order) :] + order[: number % len(order)]:
            begin, busy = time.perf_counter(), time.process_time()
            variants[name](x)
            times[name].append((time.perf_counter() - begin, time.process_time() - busy))
    return times


def single_file(directory: Path, backend: str, threads: int) -> Callable[[np.ndarray], Any]:
    if backend == "onnxruntime":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = ort.InferenceSession(
            str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        return lambda x: session.run(None, {"input": x})
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = ov.Core().compile_model(str(directory / "model.xml"), "CPU", settings)
    return lambda x: compiled([x])


def io_bytes() -> int:
    """Bytes that this process had the storage deliver."""
    return int(re.findall(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[0])


def resident_bytes() -> int:
    return 1024 * int(re.findall(r"^Rss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)[0])


@contextmanager
def runners(stack_of: dict[str, dict[str, Any]]) -> Iterator[dict[str, Runner]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Runner(**options)) for name, options in stack_of.items()}


def warm_rows(
    case: Case, root: Path, backend: str, inputs: np.ndarray, args: argparse.Namespace
) -> list[Row]:
    form = BACKENDS[backend]
    kinds = ("dense", "pruned", "sigmab")
    options = {
        k: {"directory": root / f"{k}-{form}", "backend": backend, "threads": args.threads} for k in kinds
    }
    with runners(options) as opened:
        variants: dict[str, Callable[[np.ndarray], Any]] = dict(opened)
        if form != "torch":
            variants["sigmab, single file"] = single_file(root / f"single-{form}", backend, args.threads)
        for name, variant in variants.items():
            if name in opened:
                opened[name].warm()
            for x in inputs[:8]:
                variant(x[None])
        times = timed(variants, inputs, args.rounds)
    return [_row(case, backend, name, "warm", t, times["dense"]) for name, t in times.items()]


def streamed_rows(
    case: Case, root: Path, backend: str, inputs: np.ndarray, args: argparse.Namespace, known: Sequence[Row]
) -> list[Row]:
    """Every inference reads its path; ``known`` are the warm rows, for the prediction."""
    form = BACKENDS[backend]
    rows = []
    warm = {row["variant"]: row["median_s"] for row in known}
    for label, rate in RATES.items():
        # The disk here is no faster than the third rate: its reads come from the page cache, and sha256,
        # which alone takes longer, is off for all variants.
        fast = rate > 1e9
        common = {
            "backend": backend,
            "threads": args.threads,
            "bandwidth": rate,
            "retain": False,
            "io": "cached" if fast else "auto",
            "verify": not fast,
        }
        options: dict[str, dict[str, Any]] = {
            "dense": {"directory": root / f"dense-{form}"},
            "dense, prefetch": {"directory": root / f"dense-links-{form}", "prefetch": "both"},
            "pruned": {"directory": root / f"pruned-{form}"},
            "sigmab": {"directory": root / f"sigmab-{form}"},
            "sigmab, prefetch both": {"directory": root / f"sigmab-{form}", "prefetch": "both"},
            "sigmab, prefetch likely": {"directory": root / f"sigmab-{form}", "prefetch": "likely"},
        }
        with runners({name: {**common, **own} for name, own in options.items()}) as opened:
            for x in inputs[:4]:
                for runner in opened.values():
                    runner(x[None])
            for runner in opened.values():
                runner.reset_statistics()
            rounds = max(5, args.rounds // (4 if rate < 1e8 else 1))
            times = timed(dict(opened), inputs, rounds)
            counted = {name: runner.statistics().bytes_per_inference for name, runner in opened.items()}
            from_os = {}
            for name, runner in opened.items():
                before = io_bytes()
                for x in inputs[:3]:
                    runner(x[None])
                from_os[name] = (io_bytes() - before) / 3
        for name, own_times in times.items():
            row = _row(case, backend, name, f"streamed, {label}", own_times, times["dense"])
            base = name.partition(",")[0]
            row.update(
                bytes=counted[name],
                bytes_from_os=None if fast else from_os[name],
                predicted_s=counted[name] / rate + warm[base],
            )
            rows.append(row)
    return rows


def _row(case: Case, backend: str, name: str, mode: str, times: Times, dense_times: Times) -> Row:
    (seconds, busy), (dense, dense_busy) = zip(*times, strict=True), zip(*dense_times, strict=True)
    return {
        "case": case.name,
        "backend": backend,
        "variant": name,
        "mode": mode,
        "rounds": len(seconds),
        "median_s": float(np.median(seconds)),
        "min_s": float(min(seconds)),
        "p95_s": quantile(seconds, 0.95),
        "ratio": float(np.median(seconds) / np.median(dense)),
        "ratio_of_minima": float(min(seconds) / min(dense)),
        "processor_s": float(np.median(busy)),
        "ratio_of_processor": float(np.median(busy) / np.median(dense_busy)),
    }


def residency(case: Case, root: Path, args: argparse.Namespace) -> Row:
    """Memory over many random inputs inside a budget, as the runner counts it and as the system sees it."""
    directory = root / "sigmab-onnx"
    manifest = read_manifest(directory)
    budget = int(1.5 * max(manifest.path_bytes().values()))
    rng = np.random.default_rng(0)
    with Runner(directory, backend="onnxruntime", budget_bytes=budget, threads=1) as runner:
        for _ in range(64):  # every session built, every scratch buffer allocated
            runner(rng.standard_normal((1, *case.shape), np.float32))
        runner.drop()
        empty = resident_bytes()
        runner.reset_statistics()
        highest = 0
        for number in range(args.residency):
            runner(rng.standard_normal((1, *case.shape), np.float32))
            if number % 10 == 0:
                highest = max(highest, resident_bytes() - empty)
        stats = runner.statistics()
    return {
        "case": case.name,
        "inferences": args.residency,
        "budget": budget,
        "peak_counted": stats.peak_resident_bytes,
        "peak_rss_growth": highest,
        "rss_to_budget": highest / budget,
        "switch_rate": stats.switch_rate,
        "bytes_per_inference": stats.bytes_per_inference,
        "latency_s": [stats.latency_p50, stats.latency_p95, stats.latency_p99],
    }


def agreement(case: Case, root: Path, images: np.ndarray, args: argparse.Namespace) -> list[Row]:
    """Largest difference of logits from torch's on real images, and whether every one took the same path."""
    with Runner(root / "sigmab-torch", backend="torch", threads=args.threads) as reference:
        wanted = [reference.run(batch) for batch in np.split(images, len(images) // 50)]
    rows = []
    for backend in args.backends:
        with Runner(root / f"sigmab-{BACKENDS[backend]}", backend=backend, threads=args.threads) as runner:
            got = [runner.run(batch) for batch in np.split(images, len(images) // 50)]
        rows.append(
            {
                "case": case.name,
                "backend": backend,
                "images": len(images),
                "difference": max(
                    float(np.abs(a.logits - b.logits).max()) for a, b in zip(got, wanted, strict=True)
                ),
                "largest_logit": max(float(np.abs(b.logits).max()) for b in wanted),
                "same_path": float(
                    np.mean([(a.leaves == b.leaves).mean() for a, b in zip(got, wanted, strict=True)])
                ),
                "leaf_counts": np.bincount(np.concatenate([b.leaves for b in wanted])).tolist(),
            }
        )
    return rows


def real_images(path: Path, count: int) -> np.ndarray:
    """``count`` images of a data set's test split, scaled to zero mean and unit variance."""
    from sigmab_plugin.data import Loader, open_dataset

    batch = next(iter(Loader(open_dataset(path, split="test"), batch_size=count)))[0].numpy()
    scaled: np.ndarray = ((batch - batch.mean()) / batch.std()).astype(np.float32)
    return scaled


def goals(rows: Sequence[Row], memory: Sequence[Row], counts: dict[str, Any]) -> list[Row]:
    """Each goal beside what was measured, met or not."""
    found = []

    def goal(what: str, case: str, measured: float, limit: float) -> None:
        found.append(
            {"goal": what, "case": case, "measured": measured, "limit": limit, "met": measured <= limit}
        )

    for row in rows:
        where = f"{row['case']}, {row['backend']}"
        if row["variant"] == "sigmab":
            if row["mode"] == "warm":
                goal("warm, split form / dense", where, row["ratio"], 0.75)
                goal("warm, split form / dense, processor time", where, row["ratio_of_processor"], 0.75)
            else:
                active = 4 * counts[row["case"]]["sigmab"]["parameters"]
                goal(
                    f"bytes read / active parameter bytes, {row['mode']}", where, row["bytes"] / active, 1.02
                )
        if row["mode"] == "streamed, 500 MB/s" and row["variant"] == "sigmab":
            goal("streamed at 500 MB/s / dense", where, row["ratio"], 0.45)
        if row["mode"] == "streamed, 500 MB/s" and row["variant"].startswith("sigmab, prefetch"):
            goal(f"streamed at 500 MB/s with {row['variant'][8:]} / dense", where, row["ratio"], 0.42)
    for row in memory:
        goal("resident / budget", row["case"], row["rss_to_budget"], 1.05)
    return found


def show(rows: Sequence[Row]) -> None:
    for row in rows:
        extra = ""
        if "bytes" in row:
            seen = "" if row["bytes_from_os"] is None else f" (system {row['bytes_from_os'] / 1e6:.2f})"
            extra = f"  {row['bytes'] / 1e6:7.2f} MB{seen}  predicted {row['predicted_s'] * 1e3:.1f} ms"
        print(
            f"{row['case']:13} {row['backend']:11} {row['mode']:19} {row['variant']:24} "
            f"{row['median_s'] * 1e3:8.2f} ms (min {row['min_s'] * 1e3:.2f})  {row['ratio']:.3f} of dense "
            f"({row['ratio_of_minima']:.3f} of minima, {row['ratio_of_processor']:.3f} of processor time){extra}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="where exported bundles are kept")
    parser.add_argument("--out", type=Path, required=True, help="JSON with all figures")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--rounds", type=int, default=40, help="timings of each variant")
    parser.add_argument(
        "--images", type=Path, help="data set of 32x32 images: compare 1 000 with torch's answers"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--residency", type=int, default=10_000, help="inferences inside a budget (0: skip)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    _log.setLevel(logging.INFO)
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    memory: list[Row] = []
    counts: dict[str, Any] = {}
    for name in args.cases:
        case, root = CASES[name], args.cache / name
        counts[name] = prepare(case, args.cache, [BACKENDS[b] for b in args.backends])
        print(name, json.dumps(counts[name]))
        inputs = np.random.default_rng(0).standard_normal((32, *case.shape), np.float32)
        for backend in args.backends:
            warm = warm_rows(case, root, backend, inputs, args)
            show(warm)
            streamed = streamed_rows(case, root, backend, inputs, args, warm)
            show(streamed)
            rows.extend([*warm, *streamed])
    if args.residency and "resnet50-32" in args.cases and "onnxruntime" in args.backends:
        memory.append(residency(CASES["resnet50-32"], args.cache / "resnet50-32", args))
        print(json.dumps(memory[-1]))
    agreements: list[Row] = []
    if args.images and "resnet50-32" in args.cases:
        images = real_images(args.images, 1000)
        agreements = agreement(CASES["resnet50-32"], args.cache / "resnet50-32", images, args)
        print(json.dumps(agreements, indent=1))
    found = goals(rows, memory, counts)
    for entry in found:
        word = "met" if entry["met"] else "NOT met"
        print(f"{entry['measured']:.3f} (goal {entry['limit']}) {word}: {entry['goal']} [{entry['case']}]")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "load_average": list(os.getloadavg()),
        "versions": {p: version(p) for p in ("torch", "onnxruntime", "openvino", "torch-pruning")},
        "weights": "random",
    }
    body = {
        "machine": machine,
        "counts": counts,
        "rows": rows,
        "memory": memory,
        "agreement": agreements,
        "goals": found,
    }
    args.out.write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
