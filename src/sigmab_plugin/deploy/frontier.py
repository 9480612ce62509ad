"""What a runner does to frontiers between nodes, in NumPy: count samples, take some, put results back."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ConfigError

Array = np.ndarray[Any, Any]
Frontier = tuple[Array, ...]


def is_points(frontier: Frontier, modality: str) -> bool:
    """Whether this is a ragged batch of points (x, pos, batch); deeper frontiers may be plain vectors."""
    return modality == "points" and len(frontier) == 3 and frontier[2].ndim == 1


def take(frontier: Frontier, index: Array, modality: str) -> Frontier:
    """The samples ``index`` (n,) of a frontier, in that order."""
    if not is_points(frontier, modality):
        return tuple(np.ascontiguousarray(value[index]) for value in frontier)
    x, pos, batch = frontier
    total = int(batch[-1]) + 1 if len(batch) else 0
    rank = np.full(total, -1, dtype=batch.dtype)
    rank[index] = np.arange(len(index), dtype=batch.dtype)
    renumbered = rank[batch]
    rows = np.flatnonzero(renumbered >= 0)
    rows = rows[np.argsort(renumbered[rows], kind="stable")]
    return x[rows], pos[rows], renumbered[rows]


def as_arrays(inputs: Any, dtypes: tuple[str, ...]) -> Frontier:
    """The arguments of a call as contiguous arrays: a NumPy array, a tensor, or a tuple of them.

    Raises:
        ConfigError: their number or types are not the bundle's, or there is no sample.
    """
    values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if len(values) != len(dtypes):
        raise ConfigError(f"this bundle takes {len(dtypes)} inputs; got {len(values)}")
    arrays = []
    for position, (value, dtype) in enumerate(zip(values, dtypes, strict=True)):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
        array = np.ascontiguousarray(value)
        if array.dtype.name != dtype:
            raise ConfigError(f"input {position} must be {dtype}; got {array.dtype.name}")
        if array.shape[:1] in ((), (0,)):
            raise ConfigError(f"input {position} has no samples: its shape is {array.shape}")
        arrays.append(array)
    return tuple(arrays)
