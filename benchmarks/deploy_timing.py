"""Timing of deployed networks: variants in turn, warm and streamed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sigmab_plugin.deploy import Runner
from sigmab_plugin.deploy.tracing import quantile

#: Bundle format of each backend.
BACKENDS = {
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
    "torch": "torch",
    "torch-compiled": "torch",
}
RATES = {"50 MB/s": 50e6, "500 MB/s": 500e6, "2 GB/s": 2e9}
Row = dict[str, Any]
#: Per call: wall seconds, processor seconds, bytes that the system read.
Times = list[tuple[float, float, int]]
Variant = Callable[[Any], Any]


@dataclass(frozen=True)
class Limits:
    """How long a group of rows may take: at most ``rounds`` of each variant, at least ``fewest``, ``seconds``."""

    rounds: int
    seconds: float
    fewest: int = 3


@dataclass(frozen=True)
class Setup:
    """One network on one backend. ``wrap`` makes a variant of a runner; plain calls by default."""

    case: str
    root: Path
    backend: str
    inputs: Sequence[Any]
    threads: int
    backbones: dict[str, Callable[..., Any]] | None = None

    def options(self, kind: str) -> dict[str, Any]:
        return {
            "directory": self.root / f"{kind}-{BACKENDS[self.backend]}",
            "backend": self.backend,
            "threads": self.threads,
        }


def timed(variants: dict[str, Variant], inputs: Sequence[Any], limits: Limits) -> dict[str, Times]:
    """Each variant's calls, interleaved; the order changes from round to round."""
    times: dict[str, Times] = {name: [] for name in variants}
    order = list(variants)
    end = time.perf_counter() + limits.seconds
    for number in range(limits.rounds):
        if number >= limits.fewest and time.perf_counter() > end:
            break
        x = inputs[number % len(inputs)]
        for name in order[number % len(order) :] + order[: number % len(order)]:
            before, begin, busy = io_bytes(), time.perf_counter(), time.process_time()
            variants[name](x)
            seconds, busy = time.perf_counter() - begin, time.process_time() - busy
            times[name].append((seconds, busy, io_bytes() - before))
    return times


def row(case: str, backend: str, name: str, mode: str, times: Times, dense_times: Times) -> Row:
    (seconds, busy, _), (dense, dense_busy, _) = zip(*times, strict=True), zip(*dense_times, strict=True)
    return {
        "case": case,
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


def single_file(directory: Path, backend: str, threads: int) -> Variant:
    """The single-file form in its own runtime."""
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
def _runners(setup: Setup, wanted: dict[str, dict[str, Any]]) -> Iterator[dict[str, Runner]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Runner(**options)) for name, options in wanted.items()}


def _variant(setup: Setup, name: str, runner: Runner) -> Variant:
    """Unbranched networks of points have a bundle for their tail only; a tree's runner computes its backbone."""
    backbones = setup.backbones or {}
    kind = name.partition(",")[0]
    if kind in backbones and kind != "sigmab":
        return lambda x: runner(backbones[kind](*x))
    return runner


def _options(setup: Setup, name: str, directory: str, **more: Any) -> dict[str, Any]:
    options = {**setup.options(directory), **more}
    if setup.backbones is not None and name.startswith("sigmab"):
        options["backbone"] = setup.backbones["sigmab"]
    return options


def warm_rows(setup: Setup, limits: Limits) -> list[Row]:
    """Weights in memory."""
    kinds = {"dense": "dense", "dense, cut alike": "dense-links", "pruned": "pruned", "sigmab": "sigmab"}
    if not setup.options("dense-links")["directory"].exists():
        del kinds["dense, cut alike"]
    wanted = {name: _options(setup, name, kind) for name, kind in kinds.items()}
    with _runners(setup, wanted) as opened:
        variants = {name: _variant(setup, name, runner) for name, runner in opened.items()}
        single = setup.root / f"single-{BACKENDS[setup.backend]}"
        if setup.backend in ("onnxruntime", "openvino") and single.exists():
            variants["sigmab, single file"] = single_file(single, setup.backend, setup.threads)
        for name, variant in variants.items():
            if name in opened:
                opened[name].warm()
            # A compiler works at a node's first call: every leaf has to be seen before.
            for x in setup.inputs[: 24 if "compiled" in setup.backend and name == "sigmab" else 8]:
                variant(x)
        times = timed(variants, setup.inputs, limits)
    return [row(setup.case, setup.backend, name, "warm", t, times["dense"]) for name, t in times.items()]


def streamed_rows(setup: Setup, label: str, limits: Limits, known: Sequence[Row]) -> list[Row]:
    """Every inference reads its path over a bus of one rate; ``known``: the warm rows, for the prediction."""
    rate = RATES[label]
    warm = {r["variant"]: r["median_s"] for r in known if r["mode"] == "warm"}
    # The disk of an ordinary machine is no faster than the third rate: there, reads come from the page cache.
    fast = rate > 1e9
    common = {"retain": False, "io": "cached" if fast else "auto"}
    wanted = {
        "dense": _options(setup, "dense", "dense", **common),
        "dense, prefetch": _options(setup, "dense", "dense-links", prefetch="both", **common),
        "pruned": _options(setup, "pruned", "pruned", **common),
        "pruned, prefetch": _options(setup, "pruned", "pruned-links", prefetch="both", **common),
        "sigmab": _options(setup, "sigmab", "sigmab", **common),
        "sigmab, prefetch both": _options(setup, "sigmab", "sigmab", prefetch="both", **common),
        "sigmab, prefetch likely": _options(setup, "sigmab", "sigmab", prefetch="likely", **common),
    }
    wanted = {name: options for name, options in wanted.items() if options["directory"].exists()}
    with _runners(setup, wanted) as opened:
        variants = {name: _variant(setup, name, runner) for name, runner in opened.items()}
        for name, runner in opened.items():  # every program opened, every sha256 taken once
            runner.warm()
            for x in setup.inputs[: 4 if name.startswith("sigmab") else 1]:
                variants[name](x)
        for runner in opened.values():
            runner.limit_bandwidth(rate)
            runner.reset_statistics()
        times = timed(variants, setup.inputs, limits)
        counted = {name: runner.statistics().bytes_per_inference for name, runner in opened.items()}
        from_os = {name: float(np.mean([read for _, _, read in own])) for name, own in times.items()}
    rows = []
    for name, own in times.items():
        found = row(setup.case, setup.backend, name, f"streamed, {label}", own, times["dense"])
        found.update(
            bytes=counted[name],
            bytes_from_os=None if fast else from_os[name],
            predicted_s=counted[name] / rate + warm.get(name.partition(",")[0], float("nan")),
        )
        rows.append(found)
    return rows


def show(rows: Sequence[Row]) -> None:
    for r in rows:
        head = f"{r['case']:14} {r['backend']:14} {r['mode']:19}"
        if "note" in r:
            print(f"{head} not run: {r['note']}", flush=True)
            continue
        extra = ""
        if "bytes" in r:
            seen = "" if r["bytes_from_os"] is None else f" (system {r['bytes_from_os'] / 1e6:.2f})"
            extra = f"  {r['bytes'] / 1e6:7.2f} MB{seen}  predicted {r['predicted_s'] * 1e3:.1f} ms"
        print(
            f"{head} {r['variant']:24} {r['median_s'] * 1e3:8.2f} ms (min {r['min_s'] * 1e3:.2f}, "
            f"{r['rounds']} rounds)  {r['ratio']:.3f} of dense ({r['ratio_of_minima']:.3f} of minima, "
            f"{r['ratio_of_processor']:.3f} of processor time){extra}",
            flush=True,
        )
