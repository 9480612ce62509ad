"""ONNX graphs of nodes: export, optimise, and move the weights out of the graph.

Needs ``onnx``, ``onnxscript`` and (for optimised layouts) ``onnxruntime``.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MissingDependencyError, ModelError
from .manifest import Region
from .writing import RawTensor, raw

if TYPE_CHECKING:
    import onnx

    from .nodes import NodeSource

_log = logging.getLogger(__name__)

#: Integers up to this size stay in the graph: shapes, axes and indices are part of the program. Float32 weights
#: up to it are not worth storing in fewer bits.
INLINE_BYTES = 256
#: Inputs that are part of the program though they are floats: how much to resize.
_PROGRAM_INPUTS = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}
_FUSION_INPUTS = {(op, index) for op in ("QuantizeLinear", "DequantizeLinear") for index in (1, 2)}
_FUSION_INPUTS |= {("Conv", 2), ("ConvTranspose", 2), ("Gemm", 2)}
OPSET = 18


def require(name: str, extra: str = "'sigmab-plugin[deploy]'") -> Any:
    """Import an optional library by name; ``extra`` is what pip installs it by."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"this export needs {name}; install it with: pip install {extra} ({error})"
        ) from error


def dynamic_shapes(source: NodeSource, modality: str) -> tuple[dict[int, Any], ...]:
    """Which sizes of a node's inputs vary: the batch, or for points each tensor's number of rows."""
    import torch

    if modality == "points" and len(source.example) > 1:
        rows = torch.export.Dim("points", min=1)
        same = {t.shape[0] for t in source.example} == {source.example[0].shape[0]}
        return tuple(
            {0: rows if same else torch.export.Dim(f"rows_{i}", min=1)} for i in range(len(source.example))
        )
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} if t.ndim else {} for t in source.example)


def export_failure(source: NodeSource, what: str, error: Exception, *, traced: bool) -> ModelError:
    """The error for a node that cannot be exported: which one, to what, why.

    ``traced``: torch.export, which every format begins with, had done its part.
    """
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    hint = ", or use format='torch', which needs torch.export only" if traced else ""
    detail = next((line for line in str(cause).splitlines() if line.strip()), repr(cause))
    # torch.export says further down which line of the model it could not follow.
    place = re.search(r'this error:\s+File "[^"]*?([^"/\\]+)", line (\d+), in (\w+)\s+(.+)', str(cause))
    if place is not None:
        detail += f" at `{place[4].strip()}` ({place[1]}:{place[2]}, {place[3]})"
    return ModelError(
        f"{source} cannot be exported to {what}: {type(cause).__name__}: {detail[:600]}\n"
        f"Rewrite the operation in that module{hint}."
    )


#: The exporter tells of its own migration and of each of its passes, not of the model.
_EXPORTER_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.onnx._internal.exporter._registration")


@contextmanager
def quiet(names: Sequence[str] = _EXPORTER_LOGGERS) -> Iterator[None]:
    """Only errors of the loggers ``names`` ("" is the root's own messages), and no Python warnings."""
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    try:
        for logger, _ in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers:
            logger.setLevel(level)


def export_node(source: NodeSource, *, modality: str, opset: int = OPSET) -> onnx.ModelProto:
    """The node as an ONNX model with its weights inside, batch normalisation folded.

    Raises:
        ModelError: an operation cannot be exported; names the node and gives the exporter's reason.
    """
    require("onnx")
    require("onnxscript")
    import torch

    try:
        with quiet():
            program = torch.onnx.export(
                source.module,
                source.example,
                dynamo=True,
                input_names=list(source.inputs),
                output_names=list(source.outputs),
                dynamic_shapes=(dynamic_shapes(source, modality),),  # forward takes *inputs
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; all of them mean the same to the caller
        traced = type(error).__name__ != "TorchExportError"
        raise export_failure(source, "ONNX", error, traced=traced) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    for value in model.graph.value_info:
        del value.metadata_props[:]
    return model


def optimise(model: onnx.ModelProto, *, native: bool) -> onnx.ModelProto:
    """ONNX Runtime's graph optimisations, done once at export.

    ``native`` also lays convolution weights out in blocks for this machine's vector width, which
    other machines cannot read (:func:`vector_width` tells them apart).
    """
    onnx, ort = require("onnx"), require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="sigmab-") as work:
        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if native else levels.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(work) / "optimised.onnx")
        options.log_severity_level = 3
        # Everything external: a protobuf holds 2 GB at most.
        prefix = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{prefix}_file_name", "optimised.bin")
        options.add_session_config_entry(f"{prefix}_min_size_in_bytes", str(INLINE_BYTES))
        source = str(Path(work) / "source.onnx")
        onnx.save(model, source, save_as_external_data=True, location="source.bin")
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return onnx.load(str(Path(work) / "optimised.onnx"))


def vector_width() -> int:
    """Floats per block that ONNX Runtime uses for convolutions here (8 or 16); 1 if it does not block."""
    onnx = require("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((1, 16, 1, 1), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 4, 4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    onnx.checker.check_model(model)
    probe = optimise(model, native=True)
    # One output channel is padded to a whole block; without blocks it stays one.
    return max(int(t.dims[0]) for t in probe.graph.initializer)


def take_weights(model: onnx.ModelProto, *, fusible: bool = False) -> list[RawTensor]:
    """The model's weights in order of use, removed from ``model``.

    Weights are all initializers of one or more dimensions but small integers (:data:`INLINE_BYTES`) and
    scales of resizing. The graph keeps a graph input of the same name for each: a runtime binds the bytes
    there without copying, and a session does not have to be built again when a node comes back.

    ``fusible`` leaves the scales and zero points of QuantizeLinear and DequantizeLinear, and biases, in the
    graph: ONNX Runtime makes integer kernels of such operations only where it can quantize the bias when it
    opens the graph.
    """
    from onnx import helper, numpy_helper

    order, program = _uses(model.graph, _PROGRAM_INPUTS | (_FUSION_INPUTS if fusible else set()))
    used = [t for t in model.graph.initializer if t.name in order]
    weights = [t for t in used if _is_weight(t) and t.name not in program]
    weights.sort(key=lambda t: order[t.name])
    taken = {t.name for t in weights}
    tensors = [raw(t.name, numpy_helper.to_array(t)) for t in weights]
    inputs = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in weights]
    kept = [_inline(t) for t in used if t.name not in taken]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(inputs)
    return tensors


def _is_weight(tensor: onnx.TensorProto) -> bool:
    from onnx import TensorProto

    integers = (TensorProto.INT64, TensorProto.BOOL)
    size = _size(tensor)
    return len(tensor.dims) > 0 and size > (INLINE_BYTES if tensor.data_type in integers else 0)


def _uses(graph: onnx.GraphProto, inputs: set[tuple[str, int]]) -> tuple[dict[str, int], set[str]]:
    """Each value's first use, nested graphs included, and which values are one of ``inputs``."""
    order: dict[str, int] = {}
    program: set[str] = set()

    def visit(node: onnx.NodeProto, position: int) -> None:
        for index, name in enumerate(node.input):
            order.setdefault(name, position)
            if (node.op_type, index) in inputs:
                program.add(name)
        for attribute in node.attribute:
            for inner in attribute.g.node:
                visit(inner, position)

    for position, node in enumerate(graph.node):
        visit(node, position)
    return order, program


def with_external_data(model: onnx.ModelProto, region: Region) -> onnx.ModelProto:
    """The graph of :func:`take_weights` as an ordinary model whose weights lie in ``region``'s file."""
    import onnx
    from onnx import TensorProto

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    entries = {t.name: t for t in region.tensors}
    weights = [value for value in whole.graph.input if value.name in entries]
    data = [value for value in whole.graph.input if value.name not in entries]
    for value in weights:
        entry = entries[value.name]
        tensor = whole.graph.initializer.add()
        tensor.name, tensor.data_type = value.name, value.type.tensor_type.elem_type
        tensor.dims.extend(entry.shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": region.file, "offset": region.offset + entry.offset, "length": entry.nbytes}
        for key, setting in where.items():
            tensor.external_data.add(key=key, value=str(setting))
    del whole.graph.input[:]
    whole.graph.input.extend(data)
    return whole


def _size(tensor: onnx.TensorProto) -> int:
    from onnx import helper

    return int(np.prod(tensor.dims, dtype=np.int64)) * int(
        helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )


def _inline(tensor: onnx.TensorProto) -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name)
