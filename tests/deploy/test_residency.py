"""What prefetching may take from the budget, and how what it did is counted."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sigmab_plugin.deploy import Runner, read_manifest


def test_a_guess_evicts_nothing_while_a_child_is_here(bundle: Path, images: Tensor) -> None:
    """The same input again and again, in a budget of one path: its path stays, nothing is read."""
    budget = max(read_manifest(bundle).path_bytes().values())
    with Runner(bundle, budget_bytes=budget, prefetch="both") as runner:
        for _ in range(3):
            runner(images[:1])
        runner.reset_statistics()
        for _ in range(20):
            runner(images[:1])
        stats = runner.statistics()
    assert (stats.bytes_read, stats.evictions, stats.misses) == (0, 0, 0)


def test_a_guess_takes_free_room_beside_a_child_that_is_here(bundle: Path, images: Tensor) -> None:
    with Runner(bundle, prefetch="both") as runner:
        runner(images[:1])
        runner(images[:1])
        assert runner.statistics().prefetches == 4


def test_a_prefetch_is_cancelled_once(bundle: Path) -> None:
    with Runner(bundle, bandwidth=5e4) as runner:  # 80 ms a page
        residency = runner._residency
        assert residency.prefetch("0")
        for _ in range(5):
            residency.cancel("0")
        assert runner.statistics().prefetches_cancelled == 1
