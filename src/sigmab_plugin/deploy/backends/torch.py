"""torch.export programs; weights are views of the bytes that were read."""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ..manifest import Manifest, Node
from .base import Array
from .torch_program import check_program


class _Bound:
    def __init__(self, node: Node, program: Callable[..., Any], weights: mmap.mmap | None) -> None:
        self._program = program
        self._weights: list[Tensor] = []
        for entry in node.weights.tensors:
            dtype = getattr(torch, {"bool": "bool"}.get(entry.dtype, entry.dtype))
            count = entry.nbytes // torch.empty((), dtype=dtype).element_size()
            if weights is None or count == 0:
                self._weights.append(torch.zeros(entry.shape, dtype=dtype))
                continue
            flat = torch.frombuffer(weights, dtype=dtype, count=count, offset=entry.offset)
            self._weights.append(flat.view(entry.shape))

    def __call__(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        with torch.inference_mode():
            outputs = self._program(self._weights, *(torch.from_numpy(array) for array in inputs))
        return tuple(value.numpy() for value in outputs)


class Torch:
    """``threads`` sets torch's number of threads, which the whole process shares."""

    name = "torch"
    resident_factor = 1.0

    def __init__(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)

    def program(self, node: Node, data: bytes) -> Any:
        try:
            check_program(data)
            return torch.export.load(io.BytesIO(data)).module()
        except Exception as error:  # torch.export raises many kinds; all of them mean the same to the caller
            raise FormatError(
                f"node {node.path or 'root'!r}: torch {torch.__version__} cannot open its program: {error}"
            ) from error

    def bind(self, node: Node, program: Any, weights: mmap.mmap | None) -> _Bound:
        return _Bound(node, program, weights)


def open_backend(manifest: Manifest, *, threads: int | None) -> Torch:
    return Torch(threads)
