"""What a runtime has to offer."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ...errors import MissingDependencyError
from ..manifest import Node, TensorEntry

Array = np.ndarray[Any, Any]


class Bound(Protocol):
    """A node with its weights: arrays in, arrays out. Safe to call from several threads."""

    def __call__(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]: ...


class Backend(Protocol):
    """One runtime for one bundle."""

    name: str
    resident_factor: float
    """Bytes in memory per byte of a region, once it is bound."""

    def program(self, node: Node, data: bytes) -> Any:
        """Prepare a node's program, without weights; done once per node."""

    def bind(self, node: Node, program: Any, weights: mmap.mmap | None) -> Bound:
        """A program over ``weights``, the bytes of the node's region. Dropping the result frees them."""


def views(node: Node, weights: mmap.mmap | None) -> Iterator[tuple[TensorEntry, Array]]:
    """The tensors of a region as arrays over its bytes, nothing copied."""
    for entry in node.weights.tensors:
        dtype = np.dtype(entry.dtype)
        if weights is None or entry.nbytes == 0:
            yield entry, np.zeros(entry.shape, dtype)
        else:
            count = entry.nbytes // dtype.itemsize
            yield entry, np.frombuffer(weights, dtype, count, entry.offset).reshape(entry.shape)


def missing(runtime: str, extra: str, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"backend {runtime!r} needs {runtime}; install it with: pip install {extra} ({error})"
    )
