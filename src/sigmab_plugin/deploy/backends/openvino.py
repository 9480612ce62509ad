"""OpenVINO's CPU plug-in. A node is compiled at each load: the plug-in keeps its own copy of the weights."""

from __future__ import annotations

import mmap
import threading
from typing import Any

import numpy as np

from ...errors import FormatError
from ..manifest import Manifest, Node
from .base import Array, missing

try:
    import openvino as ov
except ImportError as error:
    raise missing("openvino", "'sigmab-plugin[deploy]'", error) from error


class _Bound:
    """One infer request per concurrent caller."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        with self._lock:
            request = self._idle.pop() if self._idle else None
        if request is None:
            request = self._compiled.create_infer_request()
        results = request.infer(list(inputs), share_inputs=True)
        outputs = tuple(np.array(results[port]) for port in self._compiled.outputs)
        with self._lock:
            self._idle.append(request)
        return outputs


class OpenVino:
    """CPU execution in float32, also where the plug-in would choose bfloat16 by itself."""

    name = "openvino"

    def __init__(self, manifest: Manifest, *, threads: int | None) -> None:
        # As measured (2026.4): constants as read and as repacked for the plug-in's kernels. Float16 is widened
        # for them: a node takes what it takes in float32, for half the bytes read.
        self.resident_factor = 4.0 if manifest.precision == "fp16" else 2.0
        self._core = ov.Core()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._core.set_property("CPU", settings)

    def program(self, node: Node, data: bytes) -> bytes:
        return data

    def bind(self, node: Node, program: bytes, weights: mmap.mmap | None) -> _Bound:
        data = np.zeros(0, np.uint8) if weights is None else np.frombuffer(weights, np.uint8)
        try:
            return _Bound(self._core.compile_model(self._core.read_model(program, ov.Tensor(data)), "CPU"))
        except RuntimeError as error:
            raise FormatError(
                f"node {node.path or 'root'!r}: OpenVINO cannot open its graph: {error}"
            ) from error


def open_backend(manifest: Manifest, *, threads: int | None) -> OpenVino:
    return OpenVino(manifest, threads=threads)
