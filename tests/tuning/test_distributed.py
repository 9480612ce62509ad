"""The collectives, alone and with two gloo processes."""

from __future__ import annotations

from pathlib import Path

import torch

from sigmab_plugin.tuning import distributed

from .distributed_workers import launch


def test_alone_every_collective_is_the_identity() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    for result in (
        distributed.all_reduce_sum(rows),
        distributed.all_gather_rows(rows),
        distributed.broadcast_tensor(rows),
    ):
        assert torch.equal(result, rows)
        assert result.data_ptr() != rows.data_ptr()
    assert distributed.broadcast_object([1, "a"]) == [1, "a"]
    distributed.barrier()


def test_two_processes(tmp_path: Path) -> None:
    launch("collectives", tmp_path)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    first = torch.arange(6.0).view(3, 2)
    for rank, results in enumerate(seen):
        assert (results["world"], results["rank"], results["main"]) == (2, rank, rank == 0)
        assert results["sum"].tolist() == [2.0, 1.0]
        assert torch.equal(results["rows"], torch.cat([first[:1], first + 100]))
        assert torch.equal(results["empty"], (first[:2] + 100).long())
        assert torch.equal(results["tensor"], first)
        assert results["object"] == {"from": 1, "list": [1, 1]}
        assert results["untouched"] == rank
