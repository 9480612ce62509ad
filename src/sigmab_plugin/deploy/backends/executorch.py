"""ExecuTorch with the XNNPACK delegate. It chooses its number of threads itself."""

from __future__ import annotations

import json
import logging
import mmap
import threading
from typing import Any

import numpy as np

from ...errors import FormatError
from ..manifest import Manifest, Node
from .base import Array, missing

try:
    import torch
    from executorch.runtime import Runtime
except ImportError as error:
    raise missing("executorch", "executorch", error) from error

_log = logging.getLogger(__name__)


class _Bound:
    """One method, one caller at a time: its memory is planned once. Batches above ``limit`` run in parts."""

    def __init__(self, program: Any, method: Any, limit: int) -> None:
        self._program = program  # owns the bytes that the method points into
        self._method = method
        self._limit = limit
        self._lock = threading.Lock()

    def __call__(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        parts = []
        with self._lock:
            for start in range(0, len(inputs[0]), self._limit):
                chunk = [torch.from_numpy(array[start : start + self._limit]) for array in inputs]
                # Outputs are views of planned memory, which the next execution overwrites.
                parts.append([np.array(value.detach().numpy()) for value in self._method.execute(chunk)])
        return tuple(np.concatenate(values) for values in zip(*parts, strict=True))


class ExecuTorch:
    """Float32 on the CPU."""

    name = "executorch"
    #: The program's bytes and XNNPACK's packed copy of the weights in them.
    resident_factor = 2.0

    def __init__(self, threads: int | None) -> None:
        if threads is not None:
            _log.warning(
                "ExecuTorch's Python runtime sets its own number of threads; threads=%d is not used", threads
            )
        self._runtime = Runtime.get()

    def program(self, node: Node, data: bytes) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(data)
        return content

    def bind(self, node: Node, program: dict[str, Any], weights: mmap.mmap | None) -> _Bound:
        entry = node.weights.tensors[0]
        assert weights is not None
        try:
            loaded = self._runtime.load_program(bytes(memoryview(weights)[: entry.nbytes]))
            method = loaded.load_method(program["method"])
        except RuntimeError as error:
            raise FormatError(
                f"node {node.path or 'root'!r}: ExecuTorch cannot open its program: {error}"
            ) from error
        return _Bound(loaded, method, program["max_batch"])


def open_backend(manifest: Manifest, *, threads: int | None) -> ExecuTorch:
    return ExecuTorch(threads)
