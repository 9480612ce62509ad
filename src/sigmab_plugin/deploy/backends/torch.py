"""torch.export programs; weights are views of the bytes that were read."""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

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
            values = (torch.from_numpy(np.ascontiguousarray(array)) for array in inputs)
            outputs = self._program(self._weights, *values)
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
            program = torch.export.load(io.BytesIO(data)).module()
        except Exception as error:  # torch.export raises many kinds; all of them mean the same to the caller
            raise FormatError(
                f"node {node.path or 'root'!r}: torch {torch.__version__} cannot open its program: {error}"
            ) from error
        if not _changes_inputs(program.graph):
            return program
        return lambda weights, *inputs: program(weights, *(value.clone() for value in inputs))

    def bind(self, node: Node, program: Any, weights: mmap.mmap | None) -> _Bound:
        return _Bound(node, program, weights)


def _changes_inputs(graph: fx.Graph) -> bool:
    """Whether an operation works in place on an input or a view of one: inputs lie in the caller's memory."""
    shared: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            shared.add(node)
        elif isinstance(node.target, torch._ops.OpOverload):
            arguments = zip(node.args, node.target._schema.arguments, strict=False)
            seen = [
                described.alias_info
                for value, described in arguments
                if isinstance(value, fx.Node) and value in shared and described.alias_info is not None
            ]
            if any(alias.is_write for alias in seen):
                return True
            if seen:
                shared.add(node)
    return False


def open_backend(manifest: Manifest, *, threads: int | None) -> Torch:
    return Torch(threads)
