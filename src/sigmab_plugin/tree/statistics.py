"""One pass over the calibration data per level: latents to cluster, activations to rank channels.

A pass keeps the latents (N x D) in memory. The pooled activations of the dense block, which can be
averaged per cluster only once the clusters are known, go to a temporary file meanwhile, so that
memory does not grow with N beyond the latents and the data need not be read a second time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..tuning.distributed import all_reduce_sum
from .calibration import Calibration
from .inner import InnerActivations
from .modality import Modality
from .segments import Segments, call

_ROWS = 8192  # rows of the spool read at a time


class Spool:
    """Rows of float32 in an anonymous temporary file: appended once, read in blocks."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._columns = 0
        self._count = 0

    def append(self, rows: torch.Tensor) -> None:
        self._columns = rows.shape[1]
        self._count += rows.shape[0]
        self._file.write(np.ascontiguousarray(rows.detach().float().cpu().numpy()).tobytes())

    def __len__(self) -> int:
        return self._count

    def blocks(self) -> Iterator[torch.Tensor]:
        self._file.seek(0)
        left = self._count
        while left:
            rows = min(left, _ROWS)
            data = self._file.read(rows * self._columns * 4)
            yield torch.from_numpy(np.frombuffer(data, dtype=np.float32).reshape(rows, self._columns).copy())
            left -= rows

    def mean_by(self, label: torch.Tensor, count: int) -> torch.Tensor:
        """Mean row of every label 0..count-1, (count, C) float32; summed over all ranks in float64."""
        sums = torch.zeros(count, self._columns, dtype=torch.float64)
        start = 0
        for block in self.blocks():
            sums.index_add_(0, label[start : start + len(block)], block.double())
            start += len(block)
        sizes = torch.bincount(label, minlength=count).double()
        sums, sizes = all_reduce_sum(sums), all_reduce_sum(sizes)
        return (sums / sizes.clamp(min=1).unsqueeze(1)).float()

    def close(self) -> None:
        self._file.close()


def collect_level(
    segments: Segments,
    calibration: Calibration,
    modalities: Sequence[Modality],
    *,
    level: int,
    descend: Callable[[Any], Iterator[tuple[int, torch.Tensor, Any]]],
    embed: Callable[[int, torch.Tensor], torch.Tensor],
    inner: InnerActivations | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Spool]:
    """Latents, node and dense activations of every calibration sample at one level.

    Args:
        level: 0-based; the dense block whose output is averaged is ``segments.levels[level]``.
        descend: ``descend(backbone output)`` yields (node number at this depth, its samples' rows,
            the frontier there).
        embed: ``embed(node number, pooled)`` -> latents (n, D).
        inner: records inner planes of the dense block, too.

    Returns:
        latents (N, D), node number of each sample (N,), spooled activations (N, C): the block's
        outputs, then the inner planes.
    """
    latents: list[torch.Tensor] = []
    nodes: list[torch.Tensor] = []
    spool = Spool()
    done = 0
    for inputs in calibration.batches():
        frontier = segments.enter(inputs)
        size = modalities[0].size(frontier)
        latent: torch.Tensor | None = None
        node = torch.zeros(size, dtype=torch.long)
        for number, where, value in descend(frontier):
            part = embed(number, modalities[level].pool(value)).float().cpu()
            if latent is None:
                latent = part.new_empty(size, part.shape[1])
            latent[where.cpu()] = part
            node[where.cpu()] = number
        assert latent is not None
        latents.append(latent)
        nodes.append(node)
        for block in segments.levels[:level]:
            frontier = call(block, frontier)
        outputs = call(segments.levels[level], frontier)
        rows = modalities[level + 1].pool(outputs)
        if inner is not None:
            rows = torch.cat([rows, inner.rows(frontier, modalities[level])], dim=1)
        spool.append(rows)
        done += size
        if progress is not None:
            progress(done)
    return torch.cat(latents), torch.cat(nodes), spool
