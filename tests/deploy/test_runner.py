"""The runner: right answers, a budget that holds, memory given back, reads beside computation, faults reported."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.deploy import Runner, export, export_chain, read_manifest
from sigmab_plugin.errors import ConfigError, FormatError, SigmaBError

Expected = tuple[Tensor, Tensor]
LEAVES = ("0/0", "0/1", "1/0", "1/1")


def sample_of(leaf: str, images: Tensor, expected: Expected) -> tuple[Tensor, np.ndarray[Any, Any]]:
    index = int((expected[1] == LEAVES.index(leaf)).nonzero()[0])
    return images[index : index + 1], expected[0][index : index + 1].numpy()


def path_bytes(directory: Path) -> int:
    return max(read_manifest(directory).path_bytes().values())


@pytest.mark.parametrize("prefetch", ["none", "both", "likely"])
@pytest.mark.parametrize("retain", [True, False], ids=["retain", "stream"])
def test_answers_are_those_of_hard_routing(
    bundle: Path, images: Tensor, expected: Expected, prefetch: str, retain: bool
) -> None:
    with Runner(bundle, prefetch=prefetch, retain=retain, budget_bytes=path_bytes(bundle)) as runner:
        singles = np.concatenate([runner(image[None]) for image in images])
        batch = runner.run(images)
        mapped = runner.map(images.numpy())
    np.testing.assert_allclose(singles, expected[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(batch.logits, expected[0].numpy(), atol=1e-5)
    np.testing.assert_array_equal(batch.logits, mapped)
    np.testing.assert_array_equal(batch.leaves, expected[1].numpy())


def test_a_batch_reads_each_node_once(bundle: Path, images: Tensor) -> None:
    manifest = read_manifest(bundle)
    with Runner(bundle, retain=False) as runner:
        runner.map(images)
        assert runner.statistics().bytes_read == sum(n.weights.nbytes for n in manifest.nodes)
        assert runner.resident() == ()


def test_one_inference_reads_one_path(bundle: Path, images: Tensor, expected: Expected) -> None:
    manifest = read_manifest(bundle)
    for leaf in LEAVES:
        with Runner(bundle) as runner:
            runner(sample_of(leaf, images, expected)[0])
            assert runner.resident() == tuple(n.path for n in manifest.path_nodes(leaf))
            assert runner.statistics().bytes_read == manifest.path_bytes()[leaf]


def _read_by_the_process() -> int:
    return int(re.findall(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's I/O counters")
def test_the_system_counts_the_same_bytes(bundle: Path, images: Tensor) -> None:
    """Direct reads leave the page cache alone, so every byte of every load reaches the device."""
    manifest = read_manifest(bundle)
    with Runner(bundle, retain=False, io="direct") as runner:
        try:
            runner(images[:1])
        except FormatError as error:
            pytest.skip(f"this file system has no direct reads: {error}")
        before = _read_by_the_process()
        runner.reset_statistics()
        for image in images[:8]:
            runner(image[None])
        counted = _read_by_the_process() - before
        assert runner.statistics().bytes_read == counted == 8 * max(manifest.path_bytes().values())


def test_budget_smaller_than_a_path_is_refused(bundle: Path) -> None:
    needed = path_bytes(bundle)
    with pytest.raises(ConfigError, match=f"at least {needed} bytes"):
        Runner(bundle, budget_bytes=needed - 1)


def test_the_least_recently_used_node_makes_room(bundle: Path, images: Tensor, expected: Expected) -> None:
    manifest = read_manifest(bundle)
    leaf_bytes = manifest.node("0/0").weights.nbytes
    budget = path_bytes(bundle) + manifest.node("1").weights.nbytes + leaf_bytes
    with Runner(bundle, budget_bytes=budget) as runner:
        for leaf in ("0/0", "1/0", "0/0", "0/1"):
            runner(sample_of(leaf, images, expected)[0])
        assert runner.resident() == ("0/0", "", "0", "0/1")  # 1 and 1/0 went: used longest ago
        assert runner.statistics().evictions == 2


def test_the_budget_holds_at_every_moment(bundle: Path, images: Tensor) -> None:
    budget = path_bytes(bundle)
    with Runner(bundle, budget_bytes=budget, prefetch="both") as runner:
        for _ in range(5):
            for image in images:
                runner(image[None])
        stats = runner.statistics()
    assert stats.peak_resident_bytes <= budget
    assert stats.evictions > 20


def _resident(name: str = "Rss") -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[0])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps")
def test_dropped_weights_give_their_pages_back(tmp_path: Path) -> None:
    """Two links of 32 MB each: the process grows by a link when it loads, and shrinks when it drops."""
    size = 32 << 20
    wide = [nn.Linear(64, size // 4 // 64, bias=False), nn.Linear(size // 4 // 64, 64, bias=False)]
    manifest = export_chain(wide, torch.zeros(2, 64), tmp_path / "b", format="torch")
    x = np.ones((1, 64), np.float32)
    with Runner(tmp_path / "b") as runner:
        runner(x)
        runner.drop()
        gc.collect()
        empty = _resident()
        held = []
        for _ in range(3):
            runner(x)
            held.append(_resident() - empty)
            runner.drop()
            assert _resident() - empty < size // 8
    weights = sum(n.weights.nbytes for n in manifest.nodes)
    assert all(abs(h - weights) < size // 8 for h in held)
    budget = 2 * size + (1 << 20)
    with Runner(tmp_path / "b", budget_bytes=budget, retain=False) as runner:
        runner(x)
        assert runner.statistics().peak_resident_bytes == size  # one link at a time


@pytest.fixture(scope="module")
def slow_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three links that compute for some milliseconds and have a megabyte each to read."""

    def link() -> nn.Module:
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)) for _ in range(1))
        )

    directory = tmp_path_factory.mktemp("bundles") / "chain"
    export_chain([link(), link(), link()], torch.zeros(2, 256), directory, format="torch")
    return directory


def test_prefetched_reads_overlap_computation(slow_chain: Path) -> None:
    x = np.ones((2048, 256), np.float32)
    overlaps = {}
    for prefetch in ("none", "both"):
        with Runner(
            slow_chain, prefetch=prefetch, retain=False, bandwidth=100e6, trace=1000, threads=1
        ) as runner:
            runner(x)
            runner.trace.clear()
            runner(x)
            overlaps[prefetch] = runner.trace.overlap("read", "compute")
            reads = runner.trace.events("read")
            assert len(reads) == 3
            assert all(
                e.nbytes == n.weights.nbytes for e, n in zip(reads, runner.manifest.nodes, strict=True)
            )
    assert overlaps["none"] == 0
    assert overlaps["both"] > 2e-3


def test_prefetch_stops_reading_what_the_router_did_not_choose(
    bundle: Path, images: Tensor, expected: Expected
) -> None:
    """At this rate a child takes 0.6 s to read; the branch not taken must not cost its time."""
    manifest = read_manifest(bundle)
    with Runner(bundle, prefetch="both", bandwidth=20e3 * 5, retain=False) as runner:
        runner.warm()
        runner.reset_statistics()
        runner(sample_of("1/1", images, expected)[0])
        stats = runner.statistics()
    assert stats.prefetches_cancelled >= 1
    assert stats.bytes_read < manifest.path_bytes()["1/1"] + manifest.node("0").weights.nbytes + (64 << 10)


def test_likely_prefetch_follows_what_was_seen(bundle: Path, images: Tensor, expected: Expected) -> None:
    image = sample_of("1/0", images, expected)[0]
    with Runner(bundle, prefetch="likely", retain=False) as runner:
        for _ in range(3):
            runner(image)
        runner.reset_statistics()
        runner(image)
        stats = runner.statistics()
    assert (stats.prefetches, stats.hits, stats.misses) == (2, 2, 1)  # only the backbone was not foreseen
    assert stats.bytes_read == read_manifest(bundle).path_bytes()["1/0"]


def test_bandwidth_is_what_was_asked_for(bundle: Path, images: Tensor) -> None:
    rate = 1e6
    with Runner(bundle, bandwidth=rate, retain=False) as runner:
        runner(images[:1])
        runner.reset_statistics()
        begin = time.perf_counter()
        runner(images[:1])
        seconds = time.perf_counter() - begin
        bytes_read = runner.statistics().bytes_read
    assert bytes_read / rate <= seconds < bytes_read / rate + 1.0


def test_bandwidth_can_change(bundle: Path, images: Tensor) -> None:
    with Runner(bundle, retain=False) as runner:
        runner(images[:1])
        runner.limit_bandwidth(5e5)
        runner.reset_statistics()
        begin = time.perf_counter()
        runner(images[:1])
        assert time.perf_counter() - begin >= runner.statistics().bytes_read / 5e5
        with pytest.raises(ConfigError, match="bandwidth must be more than 0"):
            runner.limit_bandwidth(0)


def _truncate(file: Path) -> None:
    with open(file, "r+b") as f:
        f.truncate(100)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("which", ["weights", "pt2"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "No such file"), (_truncate, "truncated|sha256"), (_flip, "sha256")],
    ids=["missing", "truncated", "altered"],
)
def test_a_broken_artefact_is_named_and_the_others_go_on(
    own_bundle: Path,
    images: Tensor,
    expected: Expected,
    which: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    file = own_bundle / f"02_0_0.{which}"
    whole = file.read_bytes()
    damage(file)
    broken, answer = sample_of("0/0", images, expected)
    with Runner(own_bundle, prefetch="both", budget_bytes=path_bytes(own_bundle)) as runner:
        for _ in range(2):
            with pytest.raises(FormatError, match=rf"artefact of node '0/0' cannot be loaded: .*({message})"):
                runner(broken)
            for leaf in ("0/1", "1/0"):
                image, logits = sample_of(leaf, images, expected)
                np.testing.assert_allclose(runner(image), logits, atol=1e-5)
        assert runner.statistics().faults == 2
        file.write_bytes(whole)
        np.testing.assert_allclose(runner(broken), answer, atol=1e-5)


def test_threads_share_a_runner(bundle: Path, images: Tensor, expected: Expected) -> None:
    """The budget holds one path; eight threads want four."""
    wrong: list[float] = []
    with Runner(bundle, budget_bytes=path_bytes(bundle), prefetch="likely") as runner:

        def work(seed: int) -> None:
            for index in np.random.default_rng(seed).integers(0, len(images), 30):
                logits = runner(images[index : index + 1])
                wrong.append(float(np.abs(logits - expected[0][index].numpy()).max()))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        stats = runner.statistics()
    assert len(wrong) == 240
    assert max(wrong) < 1e-5
    assert stats.inferences == 240
    assert stats.peak_resident_bytes <= path_bytes(bundle)


def test_asynchronous_calls(bundle: Path, images: Tensor, expected: Expected) -> None:
    async def gather(runner: Runner) -> list[Any]:
        return await asyncio.gather(*(runner.arun(image[None]) for image in images[:6]))

    with Runner(bundle) as runner:
        results = asyncio.run(gather(runner))
    np.testing.assert_allclose(np.concatenate(results), expected[0][:6].numpy(), atol=1e-5)


def test_statistics_add_up(bundle: Path, images: Tensor, expected: Expected) -> None:
    order = ["0/0", "0/0", "1/1", "0/0"]
    with Runner(bundle) as runner:
        for leaf in order:
            runner(sample_of(leaf, images, expected)[0])
        stats = runner.statistics()
    assert (stats.inferences, stats.samples, stats.switches) == (4, 4, 2)
    assert (stats.reads, stats.misses, stats.hits) == (5, 5, 7)
    assert stats.leaf_counts == {"0/0": 3, "1/1": 1}
    assert 0 < stats.latency_p50 <= stats.latency_p95 <= stats.latency_p99
    assert "leaf switches  50.0%" in str(stats)


def test_a_trace_can_be_looked_at(bundle: Path, images: Tensor, tmp_path: Path) -> None:
    with Runner(bundle, trace=100) as runner:
        runner(images[:1])
        runner.trace.save(tmp_path / "trace.json")
        kinds = {event.kind for event in runner.trace.events()}
    assert kinds == {"read", "bind", "wait", "compute"}
    assert '"ph": "X"' in (tmp_path / "trace.json").read_text()


def test_wrong_inputs_and_closed_runners(bundle: Path, images: Tensor) -> None:
    runner = Runner(bundle)
    with pytest.raises(ConfigError, match="must be float32; got float64"):
        runner(images[:1].double())
    with pytest.raises(ConfigError, match="no samples"):
        runner(images[:0])
    with pytest.raises(ConfigError, match="takes 1 inputs; got 2"):
        runner((images, images))
    with pytest.raises(ConfigError, match="takes 1 inputs; got 2"):
        runner(images, images)
    with pytest.raises(ConfigError, match=r"must have shape \(batch, 3, 16, 16\); got \(1, 4, 16, 16\)$"):
        runner(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ConfigError, match=r"got \(3, 16, 16\); add the batch dimension: x\[None\]"):
        runner(images[0])
    with pytest.raises(ConfigError, match=r"no node '9'; its nodes are \['', '0', '0/0'"):
        runner.warm(["0", "9"])
    assert runner.resident() == ()
    runner.close()
    runner.close()
    with pytest.raises(SigmaBError, match="closed"):
        runner(images[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": "all"}, "prefetch must be one of"),
        ({"io": "mmap"}, "io must be one of"),
        ({"bandwidth": 0}, "bandwidth"),
        ({"bandwidth": "1"}, "bandwidth must be more than 0 bytes a second; got '1'"),
        ({"budget_bytes": "1"}, "budget_bytes must be a whole number, 0 or more; got '1'"),
        ({"budget_bytes": -1}, "budget_bytes must be a whole number, 0 or more; got -1"),
        ({"threads": 0}, "threads must be a whole number, 1 or more; got 0"),
        ({"threads": -3}, "threads must be a whole number, 1 or more; got -3"),
        ({"trace": -1}, "trace must be a whole number, 0 or more; got -1"),
        ({"backend": "tflite"}, "unknown backend"),
        ({"backend": "onnxruntime"}, "export again"),
    ],
)
def test_options_are_checked(bundle: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Runner(bundle, **options)


def test_a_backbone_outside_the_bundle(
    net: Any, images: Tensor, expected: Expected, bundle: Path, tmp_path: Path
) -> None:
    manifest = export(net, images[:2], tmp_path / "b", format="torch", backbone=False)
    assert manifest.node("").parameters == sum(p.numel() for p in net.routers["root"].parameters())
    with pytest.raises(ConfigError, match="pass backbone="):
        Runner(tmp_path / "b")
    with pytest.raises(ConfigError, match="leave out backbone="):
        Runner(bundle, backbone=net.backbone)
    with Runner(tmp_path / "b", backbone=net.backbone, prefetch="both", trace=100) as runner:
        np.testing.assert_allclose(runner.map(images), expected[0].numpy(), atol=1e-5)
        assert runner.trace.events("compute")[0].node == "backbone"

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no more")

    with Runner(tmp_path / "b", backbone=failing, prefetch="both", retain=False) as runner:
        with pytest.raises(RuntimeError, match="no more"):
            runner(images[:1])
        assert runner.statistics().prefetches == 3  # the root and its children, not kept
        deadline = time.monotonic() + 5
        while runner.statistics().resident_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert runner.statistics().resident_bytes == 0
