"""What the ranks of the distributed tests run; this file is also their program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sigmab_plugin.tuning import distributed


def launch(worker: str, folder: Path, *, processes: int = 2, **options: Any) -> None:
    """Run the function named ``worker`` on gloo ranks, as ``worker(rank, folder, **options)``."""
    command = [sys.executable, __file__, worker, str(folder), str(processes), json.dumps(options)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(processes)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise AssertionError("\n".join(outputs))


def main(worker: str, folder: str, processes: str, options: str, rank: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "rendezvous"), int(processes))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(processes))
    try:
        globals()[worker](int(rank), Path(folder), **json.loads(options))
    finally:
        dist.destroy_process_group()


def collectives(rank: int, folder: Path) -> None:
    rows = torch.arange(6, dtype=torch.float32).view(3, 2) + 100 * rank
    results = {
        "world": distributed.world_size(),
        "rank": distributed.rank(),
        "main": distributed.is_main(),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, rank])),
        "rows": distributed.all_gather_rows(rows[: 1 + 2 * rank]),
        "empty": distributed.all_gather_rows(rows[: 2 * rank].long()),
        "tensor": distributed.broadcast_tensor(rows),
        "object": distributed.broadcast_object({"from": rank, "list": [1, rank]}, source=1),
    }
    untouched = torch.tensor([float(rank)])
    distributed.all_reduce_sum(untouched)
    results["untouched"] = float(untouched)
    distributed.barrier()
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
