"""Reading weight regions: past the page cache where possible, checked, and at a limited rate if asked.

One thread reads for a whole runner, because the bus that it stands for is one. Jobs are read chunk by
chunk, so a demanded region overtakes a prefetched one, and a cancelled one stops.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import logging
import mmap
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, SigmaBError
from .manifest import PAGE, Node, round_up
from .tracing import Trace

_log = logging.getLogger(__name__)

DEMAND, PREFETCH = 0, 1

#: How a region is checked when it has been read; see :class:`Checksum`.
VERIFY = ("fast", "full", "off")


class TokenBucket:
    """Lets ``rate`` bytes a second through, as a bus that is never idle while something waits for it.

    An idle time saves nothing up; a chunk that came late for other reasons may be made up for.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = time.perf_counter()

    def begin(self) -> None:
        """A transfer starts now, or when the bus is free."""
        self._free_at = max(self._free_at, time.perf_counter())

    def take(self, nbytes: int) -> float:
        """Seconds until ``nbytes`` more have come over the bus; 0 or less if they have."""
        self._free_at += nbytes / self._rate
        return self._free_at - time.perf_counter()


class Job:
    """One region on its way into memory. ``done`` is set when ``buffer`` is whole or ``error`` says why not."""

    def __init__(self, node: Node, priority: int, rank: int = 0) -> None:
        self.node = node
        self.priority = priority
        self.rank = rank
        self.buffer: mmap.mmap | None = None
        self.error: FormatError | None = None
        self.cancelled = False
        self.done = threading.Event()
        self.started = 0.0
        self._offset = 0
        self._file = -1
        self._checksum: Checksum | None = None

    @property
    def order(self) -> tuple[bool, int, int, int]:
        """Smallest first: what ends at once, then demand before prefetch, then by rank; equals take turns."""
        turn = self._offset if self.priority == PREFETCH else 0
        return (not self.cancelled, self.priority, self.rank, turn)


#: Odd, so that a changed word changes its product; all different, so that the order of words counts.
_WORD_WEIGHTS = 2 * np.arange(PAGE // 8, dtype=np.uint64) + 1


class Checksum:
    """Of one region, chunk by chunk.

    sha256 costs a core about as much time as a fast bus needs for the bytes. So "fast" takes it at a region's
    first load only, beside a cheap one: sha256 of one number per page, the sum of its 64-bit words w[i], each
    times the odd 2i + 1, modulo 2^64. Later loads compare it with the one of the bytes that matched. One
    altered word in a page, or pages in another order, cannot pass; several altered words, or words in another
    order, pass only if their changes times their weights happen to cancel. It is no protection against someone
    who alters files on purpose; "full" takes sha256 at each load.

    Args:
        known: sum of the bytes that matched sha256 earlier, or None.
    """

    def __init__(self, mode: str, known: bytes | None) -> None:
        self._known = known
        self._full = hashlib.sha256() if mode == "full" or known is None else None
        self._sums = hashlib.sha256() if mode == "fast" else None

    def update(self, view: memoryview) -> None:
        """``view``: whole pages."""
        if self._full is not None:
            self._full.update(view)
        if self._sums is not None:
            words: np.ndarray[Any, Any] = np.frombuffer(view, np.uint64).reshape(-1, PAGE // 8)
            self._sums.update(np.einsum("pw,w->p", words, _WORD_WEIGHTS))

    @property
    def sums(self) -> bytes | None:
        return None if self._sums is None else self._sums.digest()

    def matches(self, sha256: str) -> bool:
        if self._full is not None:
            return self._full.hexdigest() == sha256
        return self.sums == self._known


class Reader:
    """Reads regions of one bundle on a thread of its own.

    Args:
        directory: of the bundle.
        bandwidth: bytes a second, or None for as fast as it goes.
        mode: ``"direct"`` past the page cache, ``"cached"`` through it, ``"auto"`` direct where the file
            system can.
        verify: "fast", "full" or "off": how each region is compared with its sha256, see :class:`Checksum`.
        chunk: bytes per read call.
        finished: called on the reading thread when a job ends, whatever way. The thread keeps alive what it
            refers to, until :meth:`stop`.

    Raises:
        ConfigError: ``mode="direct"`` on a system without direct reads.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bandwidth: float | None,
        mode: str,
        verify: str,
        trace: Trace,
        finished: Callable[[Job], None],
        chunk: int = 1 << 20,
    ) -> None:
        self._directory = directory
        self._largest_chunk = chunk
        self.limit(bandwidth)
        self.mode = mode
        if mode != "cached" and not hasattr(os, "O_DIRECT"):
            if mode == "direct":
                raise ConfigError("this system has no direct reads (O_DIRECT): use io='auto' or io='cached'")
            self._fall_back("the system has no O_DIRECT")
        self._verify = verify
        self._sums: dict[str, bytes] = {}
        self._trace = trace
        self._finished = finished
        self._jobs: list[tuple[int, Job]] = []
        self._order = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self.bytes_read = 0
        self.reads = 0
        self.read_seconds = 0.0
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="sigmab-reader", daemon=True)
        self._thread.start()

    def limit(self, bandwidth: float | None) -> None:
        """Bytes a second from the next chunk on; None for as fast as it goes."""
        chunk = self._largest_chunk
        if bandwidth is not None:  # about 1 ms a chunk, so that a demanded region need not wait long
            chunk = min(chunk, int(bandwidth * 1e-3))
        bucket = None if bandwidth is None else TokenBucket(bandwidth)
        self._pace = round_up(max(chunk, 1), PAGE), bucket  # at once: the thread may be between two chunks

    def submit(self, job: Job) -> None:
        """Read ``job`` when its turn comes.

        Raises:
            SigmaBError: in a process forked since, where the reading thread does not exist.
        """
        if os.getpid() != self._process:
            raise SigmaBError("this runner was opened before its process forked: open it after forking")
        with self._wake:
            self._jobs.append((next(self._order), job))
            self._wake.notify()

    def demand(self, job: Job) -> None:
        """Let ``job`` overtake what is only prefetched."""
        job.priority = DEMAND

    def stop(self) -> None:
        """End every job and the thread, without waiting for either."""
        if os.getpid() != self._process:
            return  # the thread is the parent's, and may have held the lock when the process forked
        with self._wake:
            self._closed = True
            for _, job in self._jobs:
                job.cancelled = True
            self._wake.notify()

    def close(self) -> None:
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closed:
                    self._wake.wait()
                if not self._jobs:
                    return
                entry = min(self._jobs, key=lambda item: (*item[1].order, item[0]))
            job = entry[1]
            ended = True
            try:
                ended = self._step(job)
            except FormatError as error:
                job.error = error
            except OSError as error:
                job.error = _fault(job.node, f"{job.node.weights.file}: {error.strerror or error}")
            except MemoryError:
                job.error = _fault(job.node, f"no memory for {job.node.weights.nbytes} bytes")
            except Exception as error:  # a reading thread that dies would leave callers waiting
                _log.exception("reading node %r failed", job.node.path)
                job.error = _fault(job.node, repr(error))
            if ended:
                with self._wake:
                    self._jobs.remove(entry)
                self._end(job)

    def _end(self, job: Job) -> None:
        if job._file >= 0:
            os.close(job._file)
            job._file = -1
        if job.error is not None or job.cancelled:
            job.buffer = None
        if job.started:
            self.reads += 1
            self.read_seconds += time.perf_counter() - job.started
            self._trace.add("read", job.node.path, job.started, job._offset)
        self._finished(job)
        job.done.set()

    def _step(self, job: Job) -> bool:
        """Read one chunk of ``job``; True when the job has ended."""
        region = job.node.weights
        chunk, bucket = self._pace
        if job.cancelled:
            return True
        if job._file < 0:
            job.started = time.perf_counter()
            if bucket is not None:
                bucket.begin()
            job._file = self._open(self._directory / region.file)
            if os.fstat(job._file).st_size < region.offset + region.nbytes:
                raise _fault(
                    job.node, f"{region.file} is truncated: {region.nbytes} bytes at {region.offset} expected"
                )
            if region.nbytes == 0:
                return True
            job.buffer = fresh_memory(region.nbytes)
            if self._verify != "off":
                job._checksum = Checksum(self._verify, self._sums.get(job.node.path))
        assert job.buffer is not None
        size = min(chunk, region.nbytes - job._offset)
        with memoryview(job.buffer)[job._offset : job._offset + size] as view:
            got = 0
            while got < size:
                with view[got:] as rest:
                    part = self._read(job, rest, region.offset + job._offset + got)
                if part <= 0:
                    end = job._offset + got
                    raise _fault(job.node, f"{region.file} ended after {end} of {region.nbytes} bytes")
                got += part
                self.bytes_read += part
            if job._checksum is not None:
                job._checksum.update(view)
        job._offset += size
        if bucket is not None and (delay := bucket.take(size)) > 0:
            with self._wake:  # a slow bus does not keep close() waiting
                self._wake.wait_for(lambda: self._closed, delay)
        if job._offset < region.nbytes:
            return False
        if job._checksum is not None:
            if not job._checksum.matches(region.sha256):
                raise _fault(job.node, f"{region.file} does not match its sha256")
            if job._checksum.sums is not None:
                self._sums[job.node.path] = job._checksum.sums
        return True

    def _open(self, file: Path) -> int:
        if self.mode in ("auto", "direct"):
            try:
                return open_regular(file, os.O_DIRECT)
            except OSError as error:
                if self.mode == "direct" or error.errno not in _REFUSED:
                    raise
                ordinary = open_regular(file)  # raises if the fault is the file's, not the file system's
                self._fall_back(error.strerror)
                return ordinary
        return open_regular(file)

    def _read(self, job: Job, view: memoryview, position: int) -> int:
        try:
            got = _read_at(job._file, view, position)
        except OSError as error:
            # Some file systems accept the flag when the file is opened and refuse the read.
            if self.mode != "auto" or error.errno not in _REFUSED:
                raise
            ordinary = open_regular(self._directory / job.node.weights.file)
            os.close(job._file)
            job._file = ordinary
            got = _read_at(job._file, view, position)  # what is wrong with the file fails here too
            self._fall_back(error.strerror)
        if self.mode == "dropped":
            os.posix_fadvise(job._file, position, got, os.POSIX_FADV_DONTNEED)
        return got

    def _fall_back(self, why: str | None) -> None:
        drops = hasattr(os, "posix_fadvise")
        self.mode = "dropped" if drops else "cached"
        _log.warning(
            "%s cannot be read past the page cache (%s): %s",
            self._directory,
            why,
            "pages are dropped after reading instead" if drops else "it is read through it",
        )


#: A file system without direct reads says so by these.
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)


def fresh_memory(nbytes: int) -> mmap.mmap:
    """``nbytes`` of fresh memory, returned to the system when nothing refers to it any more.

    Private, where Python's default is shared: only private memory comes in huge pages on an ordinary Linux,
    which take a seventh of the time to hand out (11 against 80 ms for 100 MB).
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    buffer = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def open_regular(file: Path, flags: int = 0) -> int:
    """A descriptor of ``file``, to read from.

    Raises OSError also for what opens but is no data: a directory, a device, or a pipe, whose opening and
    reading would wait for someone who writes.
    """
    opened = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | flags)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(errno.EISDIR, "not a regular file")
    return opened


def _read_at(file: int, view: memoryview, position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], position)
    os.lseek(file, position, os.SEEK_SET)
    data = os.read(file, len(view))
    view[: len(data)] = data
    return len(data)


def _fault(node: Node, why: str) -> FormatError:
    return FormatError(
        f"artefact of node {node.path or 'root'!r} cannot be loaded: {why}. Restore it or export again."
    )
