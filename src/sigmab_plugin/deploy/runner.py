"""Runs a bundle: one root-to-leaf path per input, weights loaded when a router asks for them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, SigmaBError
from . import frontier as frontiers
from .backends import open_backend
from .frontier import Array, Frontier
from .manifest import Node, read_manifest
from .programs import Programs
from .residency import Residency
from .storage import VERIFY
from .tracing import Latencies, Statistics, Trace, quantile

PREFETCH = ("none", "both", "likely")
IO = ("auto", "direct", "cached")


@dataclass(frozen=True)
class Result:
    """``logits`` (B, classes) and the leaf index of each sample, (B,)."""

    logits: Array
    leaves: Array


def _check_bandwidth(bandwidth: float | None) -> None:
    if bandwidth is not None and not (isinstance(bandwidth, Real) and bandwidth > 0):
        raise ConfigError(f"bandwidth must be more than 0 bytes a second; got {bandwidth!r}")


def _check_count(name: str, value: int | None, minimum: int) -> None:
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < minimum):
        raise ConfigError(f"{name} must be a whole number, {minimum} or more; got {value!r}")


class Runner:
    """Runs the bundle in ``directory``.

    Args:
        directory: written by :func:`sigmab_plugin.deploy.export`.
        backend: "onnxruntime", "openvino", "torch" or "executorch"; None takes the one that fits.
        budget_bytes: weights in memory at most, reads under way included; None for no limit. The least
            recently used node makes room; the backbone stays.
        prefetch: "none"; "both" starts to read all children while their parent computes, the likelier one
            first (about equally likely ones in turns), and stops the others once the router has chosen; beside
            a child that is in memory it reads only into free room;
            "likely" reads only the child that was chosen most often so far.
        bandwidth: bytes a second that reads may take, to stand in for a slow bus; None for no limit.
        io: "auto" and "direct" read past the page cache ("auto" drops pages after reading where the file
            system cannot); "cached" goes through it.
        retain: False drops each node after its use, backbone too, so that every inference streams its path.
        verify: "fast" takes sha256 at a node's first load and compares sums over its pages at later ones;
            "full" takes sha256 at each load, which costs processor time; "off" compares nothing.
        threads: of the runtime, per inference; None leaves it to the runtime.
        trace: how many events to keep (0: none).
        backbone: for a bundle exported without one: takes the inputs as they were given and returns the
            frontier, a tensor or a tuple of them.

    ``runner(x)`` takes what the network takes, a leading batch dimension included, and returns logits as a
    NumPy array; samples of a batch are grouped by path. Calls may come from several threads.

    Raises:
        ConfigError: an unknown option, or a budget smaller than one path (the number needed is in the message).
        FormatError: no bundle, or a broken manifest. A broken artefact is reported by the call that needs it;
            other paths go on working.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        backend: str | None = None,
        budget_bytes: int | None = None,
        prefetch: str = "none",
        bandwidth: float | None = None,
        io: str = "auto",
        retain: bool = True,
        verify: str = "fast",
        threads: int | None = None,
        trace: int = 0,
        backbone: Callable[..., Any] | None = None,
    ) -> None:
        if prefetch not in PREFETCH:
            raise ConfigError(f"prefetch must be one of {', '.join(PREFETCH)}; got {prefetch!r}")
        if io not in IO:
            raise ConfigError(f"io must be one of {', '.join(IO)}; got {io!r}")
        if verify not in VERIFY:
            raise ConfigError(f"verify must be one of {', '.join(VERIFY)}; got {verify!r}")
        _check_bandwidth(bandwidth)
        _check_count("budget_bytes", budget_bytes, 0)
        _check_count("threads", threads, 1)
        _check_count("trace", trace, 0)
        self.directory = Path(directory).absolute()
        self.manifest = read_manifest(self.directory)
        if self.manifest.requires.get("backbone", False) != (backbone is not None):
            raise ConfigError(
                "this bundle has a backbone of its own: leave out backbone="
                if backbone is not None
                else "this bundle was exported without its backbone: pass backbone=, a function that computes it"
            )
        self._given_backbone = backbone
        self._backend = open_backend(backend, self.manifest, threads=threads)
        factor = self._backend.resident_factor
        nodes = self.manifest.path_nodes
        needed = max(sum(int(n.memory_bytes * factor) for n in nodes(leaf)) for leaf in self.manifest.leaves)
        if budget_bytes is not None and budget_bytes < needed:
            raise ConfigError(
                f"budget_bytes={budget_bytes} is smaller than one path: at least {needed} bytes are needed"
            )
        self._prefetch = prefetch
        self._nodes = {node.path: node for node in self.manifest.nodes}
        self._leaf_index = {path: index for index, path in enumerate(self.manifest.leaves)}
        self._programs = Programs(self.manifest, self._backend, self.directory)
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._closed = False
        self._last_leaf: int | None = None
        self.trace = Trace(trace)
        self._choices: dict[str, Counter[str]] = {node.path: Counter() for node in self.manifest.nodes}
        self._residency = Residency(
            self.manifest,
            self._programs.bind,
            budget=budget_bytes,
            factor=factor,
            retain=retain,
            directory=self.directory,
            bandwidth=bandwidth,
            mode=io,
            verify=verify,
            trace=self.trace,
        )
        self.reset_statistics()

    @property
    def backend(self) -> str:
        return self._backend.name

    def limit_bandwidth(self, bandwidth: float | None) -> None:
        """Change ``bandwidth``, from the next chunk that is read on."""
        _check_bandwidth(bandwidth)
        self._residency.reader.limit(bandwidth)

    @property
    def leaves(self) -> tuple[str, ...]:
        return self.manifest.leaves

    def __call__(self, *inputs: Any) -> Array:
        """Logits (B, classes) of one input (B = 1) or of a batch. A network of several inputs takes them as such."""
        return self.run(inputs[0] if len(inputs) == 1 else inputs).logits

    def map(self, batch: Any) -> Array:
        """Logits (B, classes) of a batch; each node is loaded once and runs all samples that reach it."""
        return self.run(batch).logits

    async def arun(self, *inputs: Any) -> Array:
        """:meth:`__call__` without blocking the event loop."""
        with self._lock:
            self._check_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(thread_name_prefix="sigmab-run")
            future = asyncio.get_running_loop().run_in_executor(self._executor, self, *inputs)
        return await future

    def _check_open(self) -> None:
        if self._closed:
            raise SigmaBError("the runner is closed")

    def run(self, inputs: Any) -> Result:
        """Logits and leaves of a batch; several inputs as a tuple."""
        self._check_open()
        begin = time.perf_counter()
        parts: list[tuple[Array, str, Frontier]] = []
        ahead: list[str] = []
        try:
            if self._given_backbone is not None:
                if self._prefetch != "none":
                    if self._residency.prefetch(""):
                        ahead.append("")
                    self._read_ahead(self._nodes[""], (), ahead)
                with self.trace.span("compute", "backbone"):
                    inputs = self._given_backbone(*inputs if isinstance(inputs, (tuple, list)) else (inputs,))
            arrays = frontiers.as_arrays(inputs, self._nodes[""].inputs, modality=self.manifest.modality)
            self._visit("", arrays, None, (), parts, ahead)
        except BaseException:
            for path in ahead:
                self._residency.cancel(path)
            raise
        total = sum(len(index) for index, _, _ in parts)
        logits = np.empty((total, *parts[0][2][0].shape[1:]), parts[0][2][0].dtype)
        leaves = np.empty(total, np.int64)
        for index, path, outputs in parts:
            logits[index] = outputs[0]
            leaves[index] = self._leaf_index[path]
        self._count(leaves, time.perf_counter() - begin)
        return Result(logits, leaves)

    def _visit(
        self,
        path: str,
        inputs: Frontier,
        index: Array | None,
        upcoming: tuple[str, ...],
        parts: list[tuple[Array, str, Frontier]],
        ahead: list[str],
    ) -> None:
        """Run ``path`` for samples ``index`` (None: all), then its chosen children.

        ``upcoming`` are nodes that other samples of the batch will need next. Outputs of leaves are added to
        ``parts``, nodes whose read was started ahead of need to ``ahead``.
        """
        node = self._nodes[path]
        # The children's reads queue behind this node's own, so that the bus does not idle while it is bound.
        bound = self._residency.acquire(path, underway=lambda: self._read_ahead(node, upcoming, ahead))
        try:
            with self.trace.span("compute", path):
                outputs = bound(inputs)
        finally:
            del bound
            self._residency.release(path)
        if not node.children:
            count = outputs[0].shape[0]
            parts.append((np.arange(count) if index is None else index, path, outputs))
            return
        if len(node.children) == 1:
            self._visit(node.children[0], outputs, index, upcoming, parts, ahead)
            return
        frontier, logits = outputs[:-1], outputs[-1]
        if index is None:
            index = np.arange(len(logits))
        branch = logits.argmax(axis=1)
        chosen = [k for k in range(len(node.children)) if (branch == k).any()]
        wanted = [node.children[k] for k in chosen]
        for child in node.children:
            if child in ahead and child not in wanted:
                self._residency.cancel(child)
        with self._lock:
            self._choices[path].update({node.children[k]: int((branch == k).sum()) for k in chosen})
        for position, k in enumerate(chosen):
            rows = np.flatnonzero(branch == k)
            part = frontier if len(chosen) == 1 else frontiers.take(frontier, rows, self.manifest.modality)
            after = (*wanted[position + 1 :][:1], *upcoming)
            self._visit(node.children[k], part, index[rows], after, parts, ahead)

    def _read_ahead(self, node: Node, upcoming: tuple[str, ...], ahead: list[str]) -> None:
        """Start reads that may be needed after ``node``; adds their nodes to ``ahead``."""
        if self._prefetch == "none":
            return
        guesses = list(node.children)
        ranks = [0] * len(guesses)
        if len(guesses) > 1:
            with self._lock:
                counts = dict(self._choices[node.path])
            guesses.sort(key=lambda child: -counts.get(child, 0))
            first, second = (counts.get(child, 0) for child in guesses[:2])
            # Whatever was read of the wrong child is lost: a coin toss is worth half of either.
            if first > 1.5 * second:
                ranks = list(range(len(guesses)))
            if self._prefetch == "likely":
                guesses = guesses[:1]
                ranks = ranks[:1]
        if not node.children:
            guesses = list(upcoming[:1])
            ranks = [0] * len(guesses)
        # A guess beside a child that is here already may be in vain: the path taken last is not evicted for it.
        beside = node.children if self._prefetch == "both" else ()
        for path, rank in zip(guesses, ranks, strict=True):
            if self._residency.prefetch(path, rank, beside=beside):
                ahead.append(path)

    def warm(self, paths: Sequence[str] | None = None) -> None:
        """Load nodes now, all or ``paths``; if they exceed the budget, the last ones stay.

        Raises:
            ConfigError: the bundle has no such node; none is loaded then.
        """
        wanted = tuple(self._nodes if paths is None else paths)
        unknown = [path for path in wanted if path not in self._nodes]
        if unknown:
            raise ConfigError(f"this bundle has no node {unknown[0]!r}; its nodes are {list(self._nodes)}")
        for path in wanted:
            self._residency.acquire(path)
            self._residency.release(path)

    def drop(self) -> None:
        """Drop every node that is not in use; the next call reads again."""
        self._residency.drop_all()

    def resident(self) -> tuple[str, ...]:
        """Paths of the nodes in memory."""
        return self._residency.resident()

    def _count(self, leaves: Array, seconds: float) -> None:
        with self._lock:
            self._inferences += 1
            self._samples += len(leaves)
            self._latencies.add(seconds)
            previous = self._last_leaf
            sequence = leaves.tolist() if previous is None else [previous, *leaves.tolist()]
            self._switches += sum(a != b for a, b in itertools.pairwise(sequence))
            self._last_leaf = sequence[-1] if sequence else previous
            self._leaf_counts.update(self.manifest.leaves[i] for i in leaves.tolist())

    def statistics(self) -> Statistics:
        """Counters since the runner was opened or :meth:`reset_statistics`."""
        r, base = self._residency, self._baseline
        with self._lock:
            latencies = self._latencies.values()
            totals = self._totals()
            return Statistics(
                inferences=self._inferences,
                samples=self._samples,
                switches=self._switches,
                resident_bytes=r.resident_bytes,
                peak_resident_bytes=r.peak_resident_bytes,
                latency_p50=quantile(latencies, 0.50),
                latency_p95=quantile(latencies, 0.95),
                latency_p99=quantile(latencies, 0.99),
                leaf_counts=dict(self._leaf_counts),
                **{name: value - base[name] for name, value in totals.items()},
            )

    def _totals(self) -> dict[str, Any]:
        r = self._residency
        return {
            "bytes_read": r.reader.bytes_read,
            "reads": r.reader.reads,
            "hits": r.hits,
            "misses": r.misses,
            "evictions": r.evictions,
            "faults": r.faults,
            "prefetches": r.prefetches,
            "prefetches_cancelled": r.prefetches_cancelled,
            "read_seconds": r.reader.read_seconds,
            "wait_seconds": r.wait_seconds,
        }

    def reset_statistics(self) -> None:
        """Start counting anew; the branch frequencies that guide prefetching are kept."""
        with self._lock:
            self._inferences = self._samples = self._switches = 0
            self._latencies = Latencies()
            self._last_leaf = None
            self._leaf_counts: Counter[str] = Counter()
            self._baseline = self._totals()
            self._residency.peak_resident_bytes = self._residency.resident_bytes

    def close(self) -> None:
        """Stop reading and drop everything. Calls under way end or raise."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        self._residency.close()
        self._programs.clear()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
