"""ONNX Runtime: sessions without weights are built once; a node's bytes are bound as inputs, not copied."""

from __future__ import annotations

import mmap
from functools import cache
from typing import Any

from ...errors import FormatError
from ..manifest import Manifest, Node
from .base import Array, missing, views

try:
    import onnxruntime as ort
except ImportError as error:
    raise missing("onnxruntime", "'sigmab-plugin[deploy]'", error) from error


class _Bound:
    def __init__(self, node: Node, session: Any, weights: mmap.mmap | None) -> None:
        self._session = session
        self._inputs = [value.name for value in node.inputs]
        self._outputs = [value.name for value in node.outputs]
        self._weights = {}
        for entry, array in views(node, weights):
            self._weights[entry.name] = ort.OrtValue.ortvalue_from_numpy(array)

    def __call__(self, inputs: tuple[Array, ...]) -> tuple[Array, ...]:
        feeds = {
            name: ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in zip(self._inputs, inputs, strict=True)
        }
        results = self._session.run_with_ort_values(self._outputs, {**self._weights, **feeds})
        return tuple(value.numpy() for value in results)


@cache
def _share_arena() -> None:
    """One arena for the sessions of all nodes, once per process.

    Nodes compute one after the other, but an arena keeps what it once took. One per session would hold for
    each node what its graph expands from fewer bits, and its activations, long after its weights were dropped.
    """
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    exact_size = ort.OrtArenaCfg({"arena_extend_strategy": 1})
    try:
        ort.create_and_register_allocator(place, exact_size)
    except RuntimeError as error:
        if "already been registered" not in str(error):  # the application's own arena serves as well
            raise


class OnnxRuntime:
    """CPU execution. ``threads`` is per inference; None leaves the choice to ONNX Runtime."""

    name = "onnxruntime"
    resident_factor = 1.0

    def __init__(self, manifest: Manifest, *, threads: int | None) -> None:
        needed = manifest.requires.get("vector_width")
        if needed is not None:
            from ..onnx_graph import vector_width

            width = vector_width()
            if width != needed:
                raise FormatError(
                    f"this bundle's weights are laid out for vectors of {needed} floats, this machine has {width}: "
                    "export it here, or with layout='portable'"
                )
        self._threads = threads
        # What a native layout could gain has been done at export; a portable graph is fused when it is opened.
        native = manifest.layout == "native"
        levels = ort.GraphOptimizationLevel
        self._level = levels.ORT_DISABLE_ALL if native else levels.ORT_ENABLE_EXTENDED
        _share_arena()

    def program(self, node: Node, data: bytes) -> Any:
        options = ort.SessionOptions()
        options.graph_optimization_level = self._level
        options.log_severity_level = 3
        # The sessions of other nodes need the cores between two runs of this one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False  # plans a block per input shape, which the arena would keep, too
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        try:
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise FormatError(
                f"node {node.path or 'root'!r}: ONNX Runtime cannot open its graph: {error}"
            ) from error

    def bind(self, node: Node, program: Any, weights: mmap.mmap | None) -> _Bound:
        return _Bound(node, program, weights)


def open_backend(manifest: Manifest, *, threads: int | None) -> OnnxRuntime:
    return OnnxRuntime(manifest, threads=threads)
