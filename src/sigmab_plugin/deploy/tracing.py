"""What a runner did and when: counters, latencies, and a trace of reads and computations."""

from __future__ import annotations

import json
import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Event:
    """``kind``: read, bind, compute, wait or evict. Times in seconds of ``time.perf_counter``."""

    kind: str
    node: str
    start: float
    end: float
    thread: int
    nbytes: int = 0

    def overlap(self, other: Event) -> float:
        """Seconds during which both were under way."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


class Trace:
    """The last ``limit`` events. ``limit=0`` records nothing."""

    def __init__(self, limit: int) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self.enabled = limit > 0

    def add(self, kind: str, node: str, start: float, nbytes: int = 0) -> None:
        if self.enabled:
            end = time.perf_counter()
            self._events.append(Event(kind, node or "root", start, end, threading.get_ident(), nbytes))

    @contextmanager
    def span(self, kind: str, node: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(kind, node, start)

    def events(self, kind: str | None = None) -> tuple[Event, ...]:
        return tuple(e for e in tuple(self._events) if kind is None or e.kind == kind)

    def clear(self) -> None:
        self._events.clear()

    def overlap(self, first: str = "read", second: str = "compute") -> float:
        """Seconds in which events of both kinds were under way, pair by pair."""
        return sum(a.overlap(b) for a in self.events(first) for b in self.events(second))

    def save(self, file: str | Path) -> None:
        """Write the trace in the format of Chrome's and Perfetto's viewers."""
        rows = [
            {
                "name": f"{e.kind} {e.node}",
                "cat": e.kind,
                "ph": "X",
                "ts": e.start * 1e6,
                "dur": (e.end - e.start) * 1e6,
                "pid": 0,
                "tid": e.thread,
                "args": {"bytes": e.nbytes},
            }
            for e in self.events()
        ]
        Path(file).write_text(json.dumps({"traceEvents": rows}), encoding="utf-8")


class Latencies:
    """The last ``limit`` latencies in seconds. All memory is taken at once: a long run does not grow."""

    def __init__(self, limit: int = 10_000) -> None:
        self._seconds = array("d", bytes(8 * limit))
        self._count = 0

    def add(self, seconds: float) -> None:
        self._seconds[self._count % len(self._seconds)] = seconds
        self._count += 1

    def values(self) -> list[float]:
        return self._seconds[: self._count].tolist()


@dataclass(frozen=True)
class Statistics:
    """Totals since the runner was opened (or :meth:`Runner.reset_statistics`); bytes and seconds.

    ``inferences`` are calls, of one sample or of a batch; ``switches`` counts samples whose leaf is not the one
    before; ``hits`` are node uses that found the weights in memory or on their way, ``misses`` those that had to ask
    for a read. Latencies are those of the last 10,000 calls.
    """

    inferences: int = 0
    samples: int = 0
    bytes_read: int = 0
    reads: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    switches: int = 0
    faults: int = 0
    prefetches: int = 0
    prefetches_cancelled: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    resident_bytes: int = 0
    peak_resident_bytes: int = 0
    latency_p50: float = 0.0
    latency_p95: float = 0.0
    latency_p99: float = 0.0
    leaf_counts: dict[str, int] = field(default_factory=dict)

    @property
    def switch_rate(self) -> float:
        return self.switches / self.samples if self.samples else 0.0

    @property
    def bytes_per_inference(self) -> float:
        return self.bytes_read / self.inferences if self.inferences else 0.0

    def __str__(self) -> str:
        rows: dict[str, Any] = {
            "calls": f"{self.inferences}, of {self.samples} samples",
            "MB read": f"{self.bytes_read / 1e6:.2f} ({self.bytes_per_inference / 1e6:.3f} per call)",
            "node uses": f"{self.hits} found, {self.misses} read, {self.evictions} evicted",
            "leaf switches": f"{self.switch_rate:.1%} of samples",
            "resident MB": f"{self.resident_bytes / 1e6:.2f}, at most {self.peak_resident_bytes / 1e6:.2f}",
            "ms per call": f"p50 {self.latency_p50 * 1e3:.2f}  p95 {self.latency_p95 * 1e3:.2f}"
            f"  p99 {self.latency_p99 * 1e3:.2f}",
            "faults": self.faults,
        }
        return "\n".join(f"{name:<14} {value}" for name, value in rows.items())


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest of ``values`` that a share ``q`` of them do not exceed (nearest rank); 0 without values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
