"""The few collectives that the package needs; each works without a process group, too.

Every rank must make the same calls in the same order. Tensors may live anywhere: NCCL moves them to its
GPU and back, so a CPU tensor is answered with a CPU tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group is up in this process."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the job that ``torchrun`` started, for a ``with`` block; yields the device of this process.

    NCCL and one GPU per process where there are GPUs, gloo on the CPU otherwise. Without torchrun, or where
    a group is up already, nothing is started.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if is_distributed() or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    """Whether this process writes files and progress."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor; every rank gets bitwise the same one."""
    if world_size() == 1:
        return tensor.clone()
    total = tensor.detach().to(_device(tensor), copy=True).contiguous()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.to(tensor.device)


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order: (n_r, ...) on rank r becomes (sum n_r, ...) on every rank.

    Ranks may have different numbers of rows, none included; all else of the shape and the dtype are equal.
    """
    if world_size() == 1:
        return tensor.clone()
    local = tensor.detach().to(_device(tensor)).contiguous()
    counts = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([local.shape[0]], device=local.device))
    rows = [int(count) for count in counts]
    padded = local.new_zeros((max(rows), *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)]).to(tensor.device)


def broadcast_tensor(tensor: Tensor, source: int = 0) -> Tensor:
    """``tensor`` of rank ``source`` on every rank, as a new tensor; shapes and dtypes are equal."""
    if world_size() == 1:
        return tensor.clone()
    value = tensor.detach().to(_device(tensor), copy=True).contiguous()
    dist.broadcast(value, src=source)
    return value.to(tensor.device)


def broadcast_object(value: T, source: int = 0) -> T:
    """Plain data of rank ``source`` on every rank (goes through pickle between trusted ranks of one job)."""
    if world_size() == 1:
        return value
    box: list[Any] = [value if rank() == source else None]
    dist.broadcast_object_list(box, src=source, device=_device(torch.empty(0)))
    result: T = box[0]
    return result


def _device(tensor: Tensor) -> torch.device:
    """Where the backend can read ``tensor``: NCCL takes GPU tensors alone."""
    if dist.get_backend() == "nccl" and not tensor.is_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device
