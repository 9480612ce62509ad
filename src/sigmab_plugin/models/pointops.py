"""Farthest point sampling and ball query on ragged batches of point clouds, in plain torch.

A batch is ``pos`` (sum N, 3) with ``batch`` (sum N,), the sorted index of each point's cloud, as in
torch-geometric. Both functions pad to the largest cloud, so clouds of one size cost nothing extra.

Where pyg-lib or torch-cluster is installed, its kernels serve farthest point sampling on GPUs and the ball
query; on the CPU the plain loop over centres is faster than either. A compiled CPU ball query keeps other
neighbours (k-d tree order) than index order when the limit binds.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

_log = logging.getLogger(__name__)

#: Distances held at once by the ball query: 2**24 float32 numbers are 64 MiB.
_BLOCK = 1 << 24


def offsets(batch: Tensor) -> Tensor:
    """Start of each cloud and the end of the last, (B + 1,), from the sorted index ``batch`` (sum N,)."""
    counts = torch.bincount(batch)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def pad(pos: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor]:
    """Clouds of a ragged batch as (B, N_max, 3), padded with zeros, and the mask (B, N_max) of real points."""
    counts = ptr[1:] - ptr[:-1]
    slot = torch.arange(int(counts.max()), device=pos.device)
    mask = slot < counts[:, None]
    index = (ptr[:-1, None] + slot).clamp_(max=len(pos) - 1)
    return pos[index] * mask[..., None], mask


def farthest_point_sampling(
    pos: Tensor,
    batch: Tensor,
    count: int,
    *,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Indices into ``pos`` of ``min(count, N)`` points of each cloud, in the order of choice.

    Args:
        pos: (sum N, 3) coordinates. batch: (sum N,) sorted cloud of each point.
        count: points kept per cloud; a smaller cloud keeps all of its points.
        random_start: begin at a random point of the cloud instead of its first.
        generator: source of the random starts.
        backend: ``"torch"``, or ``"auto"`` for compiled kernels on GPUs where clouds have one size.

    Returns:
        (sum min(count, N),) indices, grouped by cloud.

    Raises:
        ConfigError: an empty batch, ``count`` under 1, or an unknown backend.
    """
    _check(pos, batch, backend)
    if count < 1:
        raise ConfigError(f"farthest point sampling keeps at least 1 point; got {count}")
    ptr = offsets(batch)
    sizes = ptr[1:] - ptr[:-1]
    compiled = _compiled() if backend == "auto" and pos.is_cuda and generator is None else None
    if compiled is not None and bool((sizes == sizes[0]).all()) and count <= int(sizes[0]):
        return compiled[0](pos, ptr, batch, count / int(sizes[0]), random_start)
    points, mask = pad(pos.detach(), ptr)
    clouds = len(points)
    if random_start:
        device = pos.device if generator is None else generator.device
        draw = torch.rand(clouds, generator=generator, device=device).to(pos.device)
        current = (draw * sizes).long()
    else:
        current = torch.zeros(clouds, dtype=torch.long, device=pos.device)
    steps = min(count, points.shape[1])
    x, y, z = (axis.contiguous() for axis in points.unbind(-1))
    # Padding sits at distance -1, under every real point, so it is chosen only after all of them.
    nearest = torch.where(mask, torch.inf, -1.0).to(points.dtype)
    chosen = torch.empty(steps, clouds, dtype=torch.long, device=pos.device)
    for step in range(steps):
        chosen[step] = current
        at = current[:, None]
        distance = (x - x.gather(1, at)).square_()
        distance += (y - y.gather(1, at)).square_()
        distance += (z - z.gather(1, at)).square_()
        nearest = torch.minimum(nearest, distance)
        current = nearest.argmax(1)
    index = chosen.t() + ptr[:-1, None]
    if bool((sizes >= steps).all()):
        return index.reshape(-1)
    return index[torch.arange(steps, device=pos.device) < sizes[:, None]]


def ball_query(
    pos: Tensor,
    centres: Tensor,
    batch: Tensor,
    centre_batch: Tensor,
    *,
    radius: float,
    max_neighbours: int,
    repeat: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Edges (2, E) from points (row 0, index into ``pos``) to the centres (row 1) that they lie near.

    The first ``max_neighbours`` points within ``radius`` in index order are kept, as in the reference
    implementations. Edges are sorted by centre.

    Args:
        pos: (sum N, 3), batch: (sum N,). centres: (sum S, 3), centre_batch: (sum S,).
        radius: in the unit of ``pos``; the border counts as inside.
        max_neighbours: kept per centre at most.
        repeat: fill every centre up to ``max_neighbours`` by repeating its first neighbour, so that the
            edges form a table; a centre without any takes the nearest point.
        backend: ``"torch"``, or ``"auto"`` for a compiled kernel where present and ``repeat`` is off.

    Raises:
        ConfigError: an empty batch, a radius or limit that is not positive, or an unknown backend.
    """
    _check(pos, batch, backend)
    if not radius > 0 or max_neighbours < 1:
        raise ConfigError(
            f"ball query needs radius > 0 and max_neighbours >= 1; got {radius}, {max_neighbours}"
        )
    ptr, centre_ptr = offsets(batch), offsets(centre_batch)
    if len(ptr) != len(centre_ptr):
        raise ConfigError(f"{len(ptr) - 1} clouds of points but {len(centre_ptr) - 1} of centres")
    compiled = _compiled() if backend == "auto" and not repeat else None
    if compiled is not None:
        edges = compiled[1](pos, centres, ptr, centre_ptr, batch, centre_batch, radius, max_neighbours)
        return edges.flip(0)
    points, mask = pad(pos.detach(), ptr)
    queries, query_mask = pad(centres.detach(), centre_ptr)
    block = max(1, _BLOCK // (points.shape[1] * queries.shape[1]))
    tables = [
        _first_within(
            queries[i : i + block], points[i : i + block], mask[i : i + block], radius, max_neighbours
        )
        for i in range(0, len(points), block)
    ]
    table = torch.cat(tables)  # (B, S, K), N_max where there is no neighbour
    missing = table == points.shape[1]
    if repeat:
        if bool(missing[..., 0].logical_and(query_mask).any()):
            nearest = torch.cdist(queries, points).masked_fill_(~mask[:, None], torch.inf).argmin(-1)
            table[..., 0] = torch.where(missing[..., 0], nearest, table[..., 0])
        table = torch.where(missing, table[..., :1], table)
    source = (table + ptr[:-1, None, None])[query_mask]
    target = torch.arange(len(source), device=pos.device)[:, None].expand_as(source)
    if repeat:
        return torch.stack([source.reshape(-1), target.reshape(-1)])
    present = ~missing[query_mask]
    return torch.stack([source[present], target[present]])


def _first_within(queries: Tensor, points: Tensor, mask: Tensor, radius: float, limit: int) -> Tensor:
    """(B, S, limit) indices of the first points within ``radius`` in index order, N where there is none."""
    size = points.shape[1]
    # Coordinate differences, not the matrix-product form: that one loses the border to rounding.
    distance = (queries[..., None, 0] - points[:, None, :, 0]).square_()
    for axis in (1, 2):
        distance += (queries[..., None, axis] - points[:, None, :, axis]).square_()
    within = (distance <= radius * radius).logical_and_(mask[:, None])
    rank = within.cumsum(-1, dtype=torch.int32)
    keep = within.logical_and_(rank <= limit)
    cloud, query, point = keep.nonzero(as_tuple=True)
    table = torch.full((*keep.shape[:2], limit), size, dtype=torch.long, device=points.device)
    table[cloud, query, rank[cloud, query, point].long() - 1] = point
    return table


def _check(pos: Tensor, batch: Tensor, backend: str) -> None:
    if backend not in ("auto", "torch"):
        raise ConfigError(f"backend must be 'auto' or 'torch'; got {backend!r}")
    if pos.dim() != 2 or pos.shape[1] != 3 or batch.shape != pos.shape[:1]:
        shapes = f"pos {tuple(pos.shape)}, batch {tuple(batch.shape)}"
        raise ConfigError(f"a batch of clouds is pos (sum N, 3) with batch (sum N,); got {shapes}")
    if len(pos) == 0:
        raise ConfigError("the batch of clouds holds no point")


_Sample = Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
_Query = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, int], Tensor]


@functools.lru_cache(maxsize=1)
def _compiled() -> tuple[_Sample, _Query] | None:
    """Compiled farthest point sampling and ball query, or None; which one is used is logged once.

    The query's rows are (centre, point), the other way round than :func:`ball_query`'s.
    """
    if _importable("pyg_lib") and hasattr(torch.ops.pyg, "fps") and hasattr(torch.ops.pyg, "radius"):
        _log.info("point clouds: pyg-lib's compiled kernels are used")
        return _pyg_kernels(torch.ops.pyg)
    if _importable("torch_cluster"):
        _log.info("point clouds: torch-cluster's compiled kernels are used")
        return _cluster_kernels(importlib.import_module("torch_cluster"))
    _log.info("point clouds: neither pyg-lib nor torch-cluster is installed, plain torch is used")
    return None


def _pyg_kernels(ops: Any) -> tuple[_Sample, _Query]:
    """pyg-lib tells clouds apart by their offsets."""
    return (
        lambda pos, ptr, batch, ratio, random_start: ops.fps(pos, ptr, ratio, random_start),
        lambda pos, centres, ptr, centre_ptr, batch, centre_batch, radius, limit: ops.radius(
            pos, centres, ptr, centre_ptr, radius, limit, 1, False
        ),
    )


def _cluster_kernels(cluster: Any) -> tuple[_Sample, _Query]:
    """torch-cluster tells clouds apart by the cloud of each point."""
    return (
        lambda pos, ptr, batch, ratio, random_start: cluster.fps(
            pos, batch, ratio=ratio, random_start=random_start
        ),
        lambda pos, centres, ptr, centre_ptr, batch, centre_batch, radius, limit: cluster.radius(
            pos, centres, radius, batch, centre_batch, max_num_neighbors=limit
        ),
    )


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):  # a wheel built for another torch fails in its own ways
        return False
    return True
