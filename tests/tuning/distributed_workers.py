"""Program of one rank of the distributed tests: ``distributed_workers.py WORKER FOLDER PROCESSES RANK``."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nets import BALANCED, QUICK, dense, samples, tree
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from sigmab_plugin.tuning import distributed, finetune, reestimate_batchnorm
from sigmab_plugin.tuning.scopes import synchronised as swapped_batchnorm

NETS = {"tree": tree, "dense": dense}


def main(worker: str, folder: str, processes: str, rank: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "rendezvous"), int(processes))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(processes))
    try:
        {"quick": quick, "training": training}[worker](int(rank), Path(folder))
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


def sharded(batch: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """The part of this rank, every second sample of the same order."""
    data = TensorDataset(*samples())
    return DataLoader(data, batch_size=batch, sampler=DistributedSampler(data, shuffle=False))


def train(rank: int, folder: Path, kind: str, norm: bool) -> None:
    net = NETS[kind](norm=norm, seed=rank)  # type: ignore[operator]
    history = finetune(
        net,
        sharded(8),
        epochs=2,
        recipe=BALANCED,
        val_loader=sharded(8),
        checkpoint_dir=folder / "run",
        progress=False,
    )
    save_file(net.state_dict(), folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(history.to_dict()))


def resume(rank: int, folder: Path) -> None:
    options = {"epochs": 3, "recipe": QUICK, "checkpoint_dir": folder / "run", "progress": False}
    stopped = finetune(tree(norm=False), sharded(8), max_seconds=0.0, **options)  # type: ignore[arg-type]
    net = tree(norm=False, seed=rank)
    finetune(net, sharded(8), **options)  # type: ignore[arg-type]
    whole = tree(norm=False)
    finetune(whole, sharded(8), epochs=3, recipe=QUICK, progress=False)
    same = all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), whole.state_dict().values(), strict=True)
    )
    (folder / f"{rank}.json").write_text(json.dumps({"same": same, "stopped": len(stopped.records)}))


def diverge(rank: int, folder: Path) -> None:
    images, targets = samples(16, seed=rank)
    if rank == 1:
        images[0] = float("nan")
    try:
        finetune(tree(norm=False), [(images, targets)], epochs=1, recipe=QUICK, progress=False)
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def batchnorm(rank: int, folder: Path) -> None:
    net = dense()[:1]
    reestimate_batchnorm(net, sharded(8))
    save_file(net.state_dict(), folder / f"{rank}.safetensors")


def synchronised(rank: int, folder: Path) -> None:
    """BatchNorm is swapped while training and back afterwards, with the same tensors."""
    net = tree()
    before = [type(m) for m in net.modules()]
    mean = net.backbone[1].running_mean
    with swapped_batchnorm(net, True):
        inside = {type(m).__name__ for m in net.modules() if hasattr(m, "running_mean")}
        shared = net.backbone[1].running_mean is mean
    after = [type(m) for m in net.modules()]
    result = {"inside": sorted(inside), "shared": shared, "restored": before == after}
    (folder / f"{rank}.json").write_text(json.dumps(result))


def unsharded(rank: int, folder: Path) -> None:
    """A plain DataLoader under a process group is worth a warning."""
    logging.basicConfig(filename=folder / f"{rank}.log")
    data = TensorDataset(*samples(16))
    finetune(dense(), DataLoader(data, batch_size=8), epochs=1, recipe=QUICK, progress=False)


def quick(rank: int, folder: Path) -> None:
    for worker in (collectives, diverge, batchnorm, synchronised, unsharded):
        (folder / worker.__name__).mkdir(exist_ok=True)
        worker(rank, folder / worker.__name__)


def training(rank: int, folder: Path) -> None:
    for kind in NETS:
        (folder / kind).mkdir(exist_ok=True)
        train(rank, folder / kind, kind=kind, norm=False)
    (folder / "resume").mkdir(exist_ok=True)
    resume(rank, folder / "resume")


def torchrun(folder: str) -> None:
    """The user's own script: join the job, train, leave."""
    with distributed.process_group() as device:
        net = tree(norm=False)
        finetune(net, sharded(8), epochs=2, recipe=QUICK, device=device, progress=False)
        save_file(
            net.state_dict(), Path(folder) / f"{distributed.rank()}-of-{distributed.world_size()}.safetensors"
        )


if __name__ == "__main__":
    torchrun(sys.argv[1]) if len(sys.argv) == 2 else main(*sys.argv[1:])
