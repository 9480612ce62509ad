"""What a runner does to frontiers between nodes, in NumPy: count samples, take some, put results back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError
from .manifest import Value

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


def as_arrays(inputs: Any, wanted: Sequence[Value], *, modality: str) -> Frontier:
    """The arguments of a call as contiguous arrays: a NumPy array, a tensor, or a tuple of them.

    Raises:
        ConfigError: their number, types or shapes are not the bundle's, or there is no sample.
    """
    values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if len(values) != len(wanted):
        raise ConfigError(f"this bundle takes {len(wanted)} inputs; got {len(values)}")
    arrays = []
    for position, (value, described) in enumerate(zip(values, wanted, strict=True)):
        try:
            array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        except (RuntimeError, TypeError, ValueError) as error:  # bfloat16, sparse tensors, ragged lists
            raise ConfigError(
                f"input {position} must be {described.dtype}; NumPy cannot hold what was given: {error}"
            ) from error
        if array.dtype.name != described.dtype:
            raise ConfigError(f"input {position} must be {described.dtype}; got {array.dtype.name}")
        if not _fits(array.shape, described.shape):
            shape = ", ".join("batch" if n is None else str(n) for n in described.shape)
            hint = "; add the batch dimension: x[None]" if _fits((1, *array.shape), described.shape) else ""
            raise ConfigError(f"input {position} must have shape ({shape}); got {array.shape}{hint}")
        if array.shape[0] == 0:
            raise ConfigError(f"input {position} has no samples: its shape is {array.shape}")
        # Runtimes read bytes as this machine orders them; the name of a type does not tell the order.
        arrays.append(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
    last = arrays[-1]
    if modality == "points" and last.ndim == 1 and last.dtype.kind == "i" and bool((np.diff(last) < 0).any()):
        raise ConfigError(
            "the points must be sorted by sample: the sample numbers, the last input, may not fall"
        )
    sizes = {array.shape[0] for array in arrays}
    if modality != "points" and len(sizes) > 1:
        raise ConfigError(f"the inputs must have one batch size; got {', '.join(map(str, sorted(sizes)))}")
    return tuple(arrays)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b is None or a == b for a, b in zip(shape, wanted, strict=True))
