"""Which nodes are in memory: a least-recently-used set inside a budget of bytes.

A node that computes is pinned and stays. A thread pins one node besides the backbone at a time and
waits for room only while it pins none, so threads cannot wait for one another in a circle.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import FormatError, SigmaBError
from .manifest import Manifest, Node
from .storage import DEMAND, PREFETCH, Job, Reader
from .tracing import Trace

#: Makes a node callable from its weights; runs once per load. The result keeps the buffer alive.
Bind = Callable[[Node, "mmap.mmap | None"], Any]


class _Slot:
    """What is known of one node: on its way (``job``), in memory (``bound``), or neither."""

    def __init__(self, node: Node, cost: int) -> None:
        self.node = node
        self.cost = cost
        self.job: Job | None = None
        self.bound: Any = None
        self.binding = False
        self.wanted = 0
        self.pins = 0
        self.used_at = 0

    @property
    def present(self) -> bool:
        return self.bound is not None or self.job is not None


class Residency:
    """Loads, keeps and drops nodes.

    Args:
        manifest: of the bundle.
        bind: see :data:`Bind`.
        budget: bytes of weights in memory at most, reads under way included; None for no limit.
        factor: bytes in memory per byte of a region.
        retain: False drops every node as soon as nothing uses it, the backbone too.
        directory, bandwidth, mode, verify, trace: see :class:`Reader`.
    """

    def __init__(
        self,
        manifest: Manifest,
        bind: Bind,
        *,
        budget: int | None,
        factor: float,
        retain: bool,
        directory: Path,
        bandwidth: float | None,
        mode: str,
        verify: str,
        trace: Trace,
    ) -> None:
        self._bind = bind
        self._budget = budget
        self._retain = retain
        self._trace = trace
        self._slots = {node.path: _Slot(node, int(node.memory_bytes * factor)) for node in manifest.nodes}
        self._changed = threading.Condition(threading.RLock())
        self._queue: deque[object] = deque()
        self._clock = 0
        self._closed = False
        self.resident_bytes = 0
        self.peak_resident_bytes = 0
        self.hits = self.misses = self.evictions = self.faults = 0
        self.prefetches = self.prefetches_cancelled = 0
        self.wait_seconds = 0.0
        # Whoever drops this without closing it gets memory and thread back: the thread must not keep it.
        finished = weakref.WeakMethod(self._finished)

        def tell(job: Job) -> None:
            if (method := finished()) is not None:
                method(job)

        self.reader = Reader(
            directory, bandwidth=bandwidth, mode=mode, verify=verify, trace=trace, finished=tell
        )
        weakref.finalize(self, self.reader.stop).atexit = False

    def acquire(self, path: str, *, underway: Callable[[], None] | None = None) -> Any:
        """The bound node, pinned until :meth:`release`; reads it if it is not in memory.

        ``underway`` is called once, when the node is in memory or its read has been asked for: reads asked
        for then follow without a gap.

        Raises:
            FormatError: its artefact is missing, truncated or altered. The node may be asked for again.
        """
        slot = self._slots[path]
        begin = time.perf_counter()
        with self._changed:
            slot.wanted += 1
            try:
                if slot.present:
                    self.hits += 1
                else:
                    self.misses += 1
                self._wait_until_bound(slot, underway)
                slot.pins += 1
                self._clock += 1
                slot.used_at = self._clock
            except FormatError:
                self.faults += 1
                raise
            finally:
                slot.wanted -= 1
                self.wait_seconds += time.perf_counter() - begin
                if self._closed:  # in vain: close() has spared what this call waited for
                    self.drop_all()
            self._trace.add("wait", path, begin)
            return slot.bound

    def _wait_until_bound(self, slot: _Slot, underway: Callable[[], None] | None) -> None:
        ticket = object()
        mine: Job | None = None
        self._queue.append(ticket)
        try:
            while slot.bound is None:
                if self._closed:
                    raise SigmaBError("the runner is closed")
                if mine is not None and mine.done.is_set() and mine.error is not None:
                    if slot.job is mine:
                        self._forget(slot)
                    raise mine.error
                if slot.job is None:
                    if ticket not in self._queue:  # the read that it relied on was cancelled
                        self._queue.append(ticket)
                    # First come, first served: a large node must not starve behind small ones.
                    if self._queue[0] is ticket and self._make_room(slot.cost, prefetch=False):
                        mine = self._start(slot, DEMAND)
                    else:
                        self._changed.wait()
                    continue
                if ticket in self._queue:
                    self._queue.remove(ticket)
                    self._changed.notify_all()
                job = slot.job
                self.reader.demand(job)
                if underway is not None:
                    underway()
                    underway = None
                if not job.done.is_set() or slot.binding:
                    self._changed.wait()
                    continue
                if job.error is not None or job.cancelled:
                    # A read that began before this call failed; the file may be whole by now.
                    if job is not mine or job.error is None:
                        self._forget(slot)
                    continue
                self._take(slot, job)
        finally:
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._changed.notify_all()
        if underway is not None:
            underway()

    def _take(self, slot: _Slot, job: Job) -> None:
        """A read has ended well: bind the weights."""
        slot.binding = True
        buffer, job.buffer = job.buffer, None
        self._changed.release()
        try:
            with self._trace.span("bind", slot.node.path):
                bound = self._bind(slot.node, buffer)
        except BaseException:
            self._changed.acquire()
            slot.binding = False
            self._forget(slot)
            raise
        self._changed.acquire()
        slot.binding, slot.job, slot.bound = False, None, bound
        self._changed.notify_all()

    def release(self, path: str) -> None:
        with self._changed:
            slot = self._slots[path]
            slot.pins -= 1
            if slot.pins == 0 and (self._closed or not self._retain):
                self._drop(slot)
            self._changed.notify_all()

    def prefetch(self, path: str, rank: int = 0, *, beside: Sequence[str] = ()) -> bool:
        """Start reading a node ahead of need; False if it is here already or there is no room.

        Of several the lower ``rank`` is read first; equal ranks take turns. While one of ``beside`` is in
        memory, only free room is used.
        """
        with self._changed:
            slot = self._slots[path]
            if slot.present or self._closed or self._queue:
                return False
            evict = all(self._slots[other].bound is None for other in beside)
            if not self._make_room(slot.cost, prefetch=True, evict=evict):
                return False
            self.prefetches += 1
            self._start(slot, PREFETCH, rank)
            return True

    def cancel(self, path: str) -> None:
        """Stop a prefetch that turned out not to be needed, unless someone waits for it."""
        with self._changed:
            slot = self._slots[path]
            job = slot.job
            if job is None or slot.wanted or slot.binding:
                return
            if job.priority == PREFETCH and not job.done.is_set():
                self._stop(job)
            elif job.done.is_set() and not self._retain:
                self._forget(slot)

    def resident(self) -> tuple[str, ...]:
        """Paths of the nodes in memory, least recently used first."""
        with self._changed:
            here = [s for s in self._slots.values() if s.bound is not None]
            return tuple(s.node.path for s in sorted(here, key=lambda s: s.used_at))

    def drop_all(self) -> None:
        """Drop every node that is not in use."""
        with self._changed:
            for slot in self._slots.values():
                if slot.bound is not None and slot.pins == 0:
                    self._drop(slot)
                elif slot.job is not None and slot.wanted == 0 and not slot.binding:
                    slot.job.cancelled = True
                    if slot.job.done.is_set():
                        self._forget(slot)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.reader.close()
        self.drop_all()

    def _start(self, slot: _Slot, priority: int, rank: int = 0) -> Job:
        job = Job(slot.node, priority, rank)
        self.reader.submit(job)
        slot.job = job
        self.resident_bytes += slot.cost
        self.peak_resident_bytes = max(self.peak_resident_bytes, self.resident_bytes)
        return job

    def _finished(self, job: Job) -> None:
        with self._changed:
            slot = self._slots[job.node.path]
            if (job.cancelled or job.error is not None) and slot.job is job and slot.wanted == 0:
                # Nobody waits: whoever asks next reads again, and is told if it fails again.
                self._forget(slot)
            job.done.set()
            self._changed.notify_all()

    def _stop(self, job: Job) -> None:
        """Once: it may be asked for again while the reading thread is still in its last chunk."""
        if not job.cancelled:
            job.cancelled = True
            self.prefetches_cancelled += 1

    def _forget(self, slot: _Slot) -> None:
        slot.job = None
        self.resident_bytes -= slot.cost
        self._changed.notify_all()

    def _drop(self, slot: _Slot) -> None:
        slot.bound = None
        self.resident_bytes -= slot.cost
        self.evictions += 1
        now = time.perf_counter()
        self._trace.add("evict", slot.node.path, now)

    def _make_room(self, cost: int, *, prefetch: bool, evict: bool = True) -> bool:
        """Evict until ``cost`` bytes fit. A prefetch gives way to what is in memory and in use."""
        if self._budget is None:
            return True
        excess = self.resident_bytes + cost - self._budget
        if excess <= 0:
            return True
        if not evict:
            return False
        # The backbone is needed by every inference: it stays.
        idle = sorted(
            (
                s
                for s in self._slots.values()
                if s.present and s.pins == 0 and s.wanted == 0 and not s.binding
            ),
            key=lambda s: (s.job is not None and not s.job.done.is_set(), s.used_at),
        )
        idle = [s for s in idle if s.node.path != "" and not (prefetch and s.job is not None)]
        victims: list[_Slot] = []
        for slot in idle:
            if excess <= 0:
                break
            victims.append(slot)
            excess -= slot.cost
        if excess > 0:
            return False
        pending = False
        for slot in victims:
            if slot.bound is not None:
                self._drop(slot)
            elif slot.job is not None and slot.job.done.is_set():
                self._forget(slot)
            elif slot.job is not None:
                # Its memory is free only when the reading thread has let go of it.
                self._stop(slot.job)
                pending = True
        return not pending
