"""The reader: what its checksums find, which read goes first, and what a bus is kept busy with."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from sigmab_plugin.deploy import Runner, read_manifest, storage
from sigmab_plugin.deploy.manifest import PAGE, FileEntry, Node, Region
from sigmab_plugin.deploy.storage import DEMAND, PREFETCH, Checksum, Job, Reader
from sigmab_plugin.deploy.tracing import Latencies, Trace, quantile
from sigmab_plugin.errors import ConfigError, FormatError


def _node(directory: Path, name: str, pages: int) -> Node:
    data = np.random.default_rng(len(name)).integers(0, 256, pages * PAGE, np.uint8).tobytes()
    (directory / name).write_bytes(data)
    region = Region(name, 0, len(data), len(data), hashlib.sha256(data).hexdigest(), ())
    return Node(name, name, "leaf", (), (), (), FileEntry(name, 0, ""), region, 0)


@pytest.mark.parametrize(("ranks", "left"), [((0, 0), "little"), ((0, 1), "all")])
def test_equal_guesses_take_turns_and_a_likelier_one_goes_first(
    tmp_path: Path, ranks: tuple[int, int], left: str
) -> None:
    nodes = [_node(tmp_path, name, 64) for name in ("a", "bb")]
    jobs = [Job(node, PREFETCH, rank) for node, rank in zip(nodes, ranks, strict=True)]
    seen: list[tuple[str, int]] = []

    def finished(job: Job) -> None:
        seen.append((job.node.path, sum(j._offset for j in jobs if j is not job)))

    hold = Job(_node(tmp_path, "hold", 64), DEMAND)  # both are queued while this one is read
    reader = Reader(
        tmp_path,
        bandwidth=2e6,
        mode="cached",
        verify="full",
        trace=Trace(0),
        finished=finished,
        chunk=4 * PAGE,
    )
    for job in (hold, *jobs):
        reader.submit(job)
    for job in jobs:
        assert job.done.wait(10)
    reader.close()
    assert [name for name, _ in seen] == ["hold", "a", "bb"]
    other = seen[1][1]
    if left == "all":
        assert other == 0
    else:
        assert nodes[1].weights.nbytes / 2 < other < nodes[1].weights.nbytes


def _swap_pages(data: bytearray) -> None:
    data[:PAGE], data[PAGE : 2 * PAGE] = data[PAGE : 2 * PAGE], data[:PAGE]


def _flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def _move_a_bit(data: bytearray) -> None:
    """One bit less here, one more there: the sum over both words stays."""
    data[0], data[2 * PAGE] = data[0] ^ 1, data[2 * PAGE] ^ 1


def _swap_words(data: bytearray) -> None:
    data[8:16], data[16:24] = data[16:24], data[8:16]


def _reverse_pages(data: bytearray) -> None:
    """Every page word by word: its plain sum stays."""
    words = np.frombuffer(bytes(data), np.uint64).reshape(-1, PAGE // 8)
    data[:] = np.ascontiguousarray(words[:, ::-1]).tobytes()


@pytest.mark.parametrize("damage", [_flip, _swap_pages, _move_a_bit, _swap_words, _reverse_pages])
@pytest.mark.parametrize("mode", ["fast", "full"])
def test_checksums_see_what_changed(mode: str, damage: Any) -> None:
    good = bytearray(np.random.default_rng(0).integers(0, 256, 4 * PAGE, np.uint8).tobytes())
    sha256 = hashlib.sha256(good).hexdigest()
    first = Checksum(mode, None)
    first.update(memoryview(good))
    assert first.matches(sha256)
    known = first.sums
    assert (known is None) == (mode == "full")
    again, later = Checksum(mode, known), Checksum(mode, known)
    again.update(memoryview(good)[: 2 * PAGE])  # in other chunks
    again.update(memoryview(good)[2 * PAGE :])
    assert again.matches(sha256)
    damage(good)
    later.update(memoryview(good))
    assert not later.matches(sha256)
    unseen = Checksum(mode, None)
    unseen.update(memoryview(good))
    assert not unseen.matches(sha256)


@pytest.mark.parametrize("verify", ["fast", "full", "off"])
def test_a_node_damaged_after_its_first_load_is_found(own_bundle: Path, images: Tensor, verify: str) -> None:
    file = own_bundle / read_manifest(own_bundle).node("").weights.file
    whole = file.read_bytes()
    with Runner(own_bundle, retain=False, verify=verify) as runner:
        answer = runner(images[:1])
        damaged = bytearray(whole)
        damaged[9] ^= 1
        file.write_bytes(damaged)
        if verify == "off":
            runner(images[:1])
            assert runner.statistics().faults == 0
            return
        with pytest.raises(FormatError, match=r"node 'root'.*sha256"):
            runner(images[:1])
        assert runner.resident() == ()
        assert runner.statistics().resident_bytes == 0
        file.write_bytes(whole)
        np.testing.assert_array_equal(runner(images[:1]), answer)


def _a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _a_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs direct reads")
@pytest.mark.parametrize("damage", [Path.unlink, _a_directory, _a_loop])
def test_one_bad_file_does_not_end_direct_reads(
    own_bundle: Path, images: Tensor, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = own_bundle / read_manifest(own_bundle).node("").weights.file
    damage(file)
    with Runner(own_bundle) as runner:
        with pytest.raises(FormatError, match="node 'root'"):
            runner(images[:1])
        assert runner._residency.reader.mode == "auto"
    assert "page cache" not in caplog.text


def test_a_file_system_that_refuses_direct_reads(
    bundle: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused when a file is opened, as by tmpfs of older kernels: read through the cache, told once."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        pytest.skip("needs direct reads")
    plain = os.open

    def refusing(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with Runner(bundle) as runner:
        assert runner(images[:1]).shape == (1, 10)
        assert runner._residency.reader.mode == "dropped"
    assert caplog.text.count("cannot be read past the page cache") == 1


@pytest.mark.parametrize("io", ["auto", "direct", "cached"])
def test_a_system_without_direct_reads(
    bundle: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, io: str
) -> None:
    """As macOS: asked for, they are an error; left to the runner, it says what it does."""
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    if io == "direct":
        with pytest.raises(ConfigError, match="no direct reads"):
            Runner(bundle, io=io)
        return
    with Runner(bundle, io=io) as runner:
        assert runner(images[:1]).shape == (1, 10)
        assert runner._residency.reader.mode == "cached"
    assert caplog.text.count("page cache") == (io == "auto")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("io", ["auto", "cached"])
@pytest.mark.parametrize("which", ["weights", "program"])
def test_a_pipe_in_place_of_an_artefact_is_refused(
    own_bundle: Path, images: Tensor, which: str, io: str
) -> None:
    """Reading it would wait for someone who writes."""
    file = own_bundle / getattr(read_manifest(own_bundle).node(""), which).file
    file.unlink()
    os.mkfifo(file)
    ended: list[Any] = []
    with Runner(own_bundle, io=io) as runner:

        def call() -> None:
            try:
                ended.append(runner(images[:1]))
            except FormatError as error:
                ended.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join(5)
        if thread.is_alive():  # let it go, so that the test can fail
            os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
            thread.join(5)
    assert re.search("node 'root'.*not a regular file", str(ended[0]))


@pytest.mark.parametrize(("rate", "chunk"), [(1.0, PAGE), (10e6, 3 * PAGE), (500e6, 123 * PAGE)])
def test_a_chunk_is_a_millisecond_of_the_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float, chunk: int
) -> None:
    sizes: list[int] = []
    read = storage._read_at

    def noting(file: int, view: memoryview, position: int) -> int:
        sizes.append(len(view))
        return read(file, view, position)

    monkeypatch.setattr(storage, "_read_at", noting)
    reader = Reader(
        tmp_path, bandwidth=rate, mode="cached", verify="off", trace=Trace(0), finished=lambda job: None
    )
    reader.submit(Job(_node(tmp_path, "a", 256), PREFETCH))
    while not sizes:
        time.sleep(1e-3)
    reader.close()
    assert sizes[0] == chunk


def test_quantiles_are_nearest_ranks() -> None:
    assert quantile([], 0.5) == 0
    assert [quantile([3.0, 1.0, 2.0, 4.0], q) for q in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]
    assert quantile(range(1, 101), 0.95) == 95
    assert quantile(range(1, 101), 0.99) == 99


def test_latencies_keep_the_last_ones() -> None:
    kept = Latencies(3)
    assert kept.values() == []
    for seconds in (1.0, 2.0, 3.0, 4.0):
        kept.add(seconds)
    assert sorted(kept.values()) == [2.0, 3.0, 4.0]


def test_verify_is_checked(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="verify must be one of fast, full, off"):
        Runner(bundle, verify="sometimes")


def test_children_are_read_while_their_parent_is_bound(
    bundle: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some runtimes compile a node when it is bound; the bus need not wait for that."""
    overlap = {}
    for prefetch in ("none", "both"):
        with Runner(bundle, retain=False, prefetch=prefetch, bandwidth=5e5, trace=100) as runner:
            runner(images[:1])
            bind = runner._backend.bind

            def slow(*arguments: Any, bind: Any = bind) -> Any:
                time.sleep(0.03)
                return bind(*arguments)

            monkeypatch.setattr(runner._backend, "bind", slow)
            runner.trace.clear()
            runner(images[:1])
            overlap[prefetch] = runner.trace.overlap("read", "bind")
    assert overlap["none"] == 0
    assert overlap["both"] > 0.01


def test_a_broken_parent_leaves_no_guess_behind(own_bundle: Path, images: Tensor) -> None:
    (own_bundle / read_manifest(own_bundle).node("").weights.file).unlink()
    with Runner(own_bundle, retain=False, prefetch="both") as runner:
        with pytest.raises(FormatError, match="node 'root'"):
            runner(images[:1])
        deadline = time.monotonic() + 5
        while runner.statistics().resident_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert runner.statistics().resident_bytes == 0


def test_a_read_that_failed_before_the_call_is_not_its_fault(
    own_bundle: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root is prefetched while its file is short; the file is whole when the call comes."""
    file = own_bundle / read_manifest(own_bundle).node("").weights.file
    whole = file.read_bytes()
    with Runner(own_bundle) as runner:
        answer = runner(images[:1])
        runner.drop()
        file.write_bytes(whole[:100])
        residency = runner._residency
        with residency._changed:  # the failed read stays to be found
            monkeypatch.setattr(residency.reader, "_finished", lambda job: None)
            assert residency.prefetch("")
            job = residency._slots[""].job
        assert job is not None
        assert job.done.wait(10)
        assert job.error is not None
        monkeypatch.undo()
        with pytest.raises(FormatError, match="truncated"):
            runner(images[:1])  # still short: this call's own read says so
        file.write_bytes(whole)
        np.testing.assert_array_equal(runner(images[:1]), answer)
        assert runner.statistics().faults == 1
