"""Precisions of ONNX artefacts: weights stored in fewer bits, or static INT8 calibrated leaf by leaf."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..counting import as_arguments
from ..errors import CalibrationError, ModelError
from .frontier import take
from .nodes import NodeSource
from .onnx_graph import INLINE_BYTES, quiet, require

if TYPE_CHECKING:
    import onnx

_log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Calibration = dict[str, list[tuple[Array, ...]]]

#: Weights that share a scale at 4 bits.
BLOCK = 32
#: Batches per node that calibration keeps.
BATCHES = 64


def collect(sources: Sequence[NodeSource], data: Iterable[Any], modality: str) -> Calibration:
    """What reaches each node when ``data`` (batches of inputs) is routed: its inputs, batch by batch.

    Raises:
        CalibrationError: ``data`` are no batches of the network's inputs, or no sample reaches some node, whose
            ranges would then be made up.
    """
    if isinstance(data, (torch.Tensor, np.ndarray)):
        raise CalibrationError(
            "calibration_data must be a list of batches; got one array: put it into a list"
        )
    by_path = {source.path: source for source in sources}
    found: Calibration = {path: [] for path in by_path}

    def visit(path: str, inputs: tuple[Array, ...]) -> None:
        if len(found[path]) < BATCHES:
            found[path].append(inputs)
        source = by_path[path]
        if not source.children:
            return
        outputs = [t.numpy() for t in source.module(*map(torch.from_numpy, inputs))]
        branch = outputs[-1].argmax(1)
        for number, child in enumerate(source.children):
            rows = np.flatnonzero(branch == number)
            if len(rows):
                visit(child, take(tuple(outputs[:-1]), rows, modality))

    for batch in data:
        visit("", _arrays(batch, sources[0].example))
    unseen = [path or "root" for path, batches in found.items() if not batches]
    if unseen:
        raise CalibrationError(
            f"no calibration sample reaches {', '.join(unseen)}: give more, or more varied, calibration data"
        )
    return found


def _arrays(batch: Any, example: Sequence[torch.Tensor]) -> tuple[Array, ...]:
    """A batch as arrays, of tensors or arrays such as ``example``.

    Raises:
        CalibrationError: their number, types or shapes are others.
    """
    values = [
        value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for value in as_arguments(batch)
    ]
    wanted = [(str(value.dtype).removeprefix("torch."), tuple(value.shape[1:])) for value in example]
    found = [(value.dtype.name, value.shape[1:]) for value in values]
    if found != wanted:
        raise CalibrationError(
            f"a batch of calibration_data is {_listed(found)}; the network takes {_listed(wanted)}: give batches of "
            "inputs alone, without targets"
        )
    return tuple(values)


def _listed(values: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{dtype} ({', '.join(('batch', *map(str, shape)))})" for dtype, shape in values)


class _Reader:
    """ONNX Runtime's calibration interface."""

    def __init__(self, names: Sequence[str], batches: Sequence[tuple[Array, ...]]) -> None:
        self._feeds = iter([dict(zip(names, batch, strict=True)) for batch in batches])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """All batches are read at once; ONNX Runtime asks for ranges only when it reads in parts."""


def quantize_static(
    model: onnx.ModelProto, source: NodeSource, batches: Sequence[tuple[Array, ...]]
) -> onnx.ModelProto:
    """INT8 weights per output channel and UINT8 activations per tensor, by ONNX Runtime, fused.

    Inputs and outputs of the node, and its router, stay in float32.

    Raises:
        ModelError: ONNX Runtime cannot quantize the node; names it and gives the reason.
    """
    onnx = require("onnx")
    quantization = require("onnxruntime.quantization")
    with tempfile.TemporaryDirectory(prefix="sigmab-") as work:
        plain, quantized = Path(work) / "plain.onnx", Path(work) / "int8.onnx"
        onnx.save(model, str(plain))
        try:
            with quiet([""]):  # hints about preprocessing, to the root logger, for each node twice
                quantization.quantize_static(
                    str(plain),
                    str(quantized),
                    _Reader(source.inputs, batches),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                    op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Relu", "MaxPool", "ReduceMean"],
                    nodes_to_exclude=[node.name for node in _router_nodes(model)],
                )
        except Exception as error:  # the quantizer raises many kinds; all of them mean the same to the caller
            raise ModelError(f"{source} cannot be quantized: {error}") from error
        return onnx.load(str(quantized))


def _router_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes that only the router's logits depend on: a decision is worth more than its few bytes."""
    outputs = [value.name for value in model.graph.output]
    if outputs[-1] != "router_logits":
        return []
    frontier = _ancestors(model, outputs[:-1])
    return [node for node in model.graph.node if frontier.isdisjoint(node.output)]


def _ancestors(model: onnx.ModelProto, names: Iterable[str]) -> set[str]:
    """Every value that ``names`` are computed from, themselves included."""
    producer = {output: node for node in model.graph.node for output in node.output}
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending.extend(producer[name].input if name in producer else ())
    return found


def too_large_for_half(source: NodeSource, tensors: Mapping[str, Array]) -> set[str]:
    """Names of ``tensors`` with numbers past 65504, which float16 would make infinite; logged."""
    limit = float(np.finfo(np.float16).max)
    found = [name for name, value in tensors.items() if not np.abs(value).max(initial=0) <= limit]
    if found:
        _log.warning("%s: numbers past float16's %g stay in float32: %s", source, limit, ", ".join(found))
    return set(found)


def store_half(model: onnx.ModelProto, source: NodeSource) -> None:
    """Store float32 weights as float16; a Cast widens each before its use. In place.

    The router's weights stay in float32, and tensors with numbers that float16 cannot hold.
    """
    from onnx import TensorProto, helper, numpy_helper

    router = {node.output[0] for node in _router_nodes(model)}
    elsewhere = {name for node in model.graph.node if node.output[0] not in router for name in node.input}
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and tensor.name in elsewhere
    }
    wanted = weights.keys() - too_large_for_half(source, weights)

    def convert(name: str, weight: Array) -> tuple[list[tuple[str, Array]], list[onnx.NodeProto]]:
        cast = helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.widen", to=TensorProto.FLOAT)
        return [(f"{name}.half", weight.astype(np.float16))], [cast]

    _replace(model, convert, wanted.__contains__)


def quantize_weights(model: onnx.ModelProto, *, bits: int) -> onnx.ModelProto:
    """Store matrices and kernels as integers with float32 scales; expanded before use, computed in float32.

    8 bits: symmetric, one scale per output channel. 4 bits: symmetric, one scale per :data:`BLOCK` weights
    of an output channel, two weights in a byte. Everything else stays float32.
    """
    axes = _output_axes(model)
    convert = _to_int8 if bits == 8 else _to_int4

    def apply(name: str, weight: Array) -> tuple[list[tuple[str, Array]], list[onnx.NodeProto]]:
        return convert(name, weight, axes[name])

    _replace(model, apply, axes.__contains__)
    return model


def _output_axes(model: onnx.ModelProto) -> dict[str, int]:
    """Initializers that are weights of a convolution or a product, and the axis of their output channels."""
    known = {tensor.name for tensor in model.graph.initializer}
    axes: dict[str, int] = {}
    for node in model.graph.node:
        if len(node.input) < 2 or node.input[1] not in known:
            continue
        if node.op_type == "Conv":
            axes[node.input[1]] = 0
        elif node.op_type == "Gemm":
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axes[node.input[1]] = 0 if transposed else 1
        elif node.op_type == "MatMul":
            axes[node.input[1]] = -1
    return axes


def _to_int8(name: str, weight: Array, axis: int) -> tuple[list[tuple[str, Array]], list[onnx.NodeProto]]:
    from onnx import helper

    axis %= weight.ndim
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / 127, np.finfo(np.float32).tiny).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    whole = np.rint(weight / scale.reshape(shape)).clip(-127, 127).astype(np.int8)
    inputs = [f"{name}.int8", f"{name}.scale"]
    node = helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.expand", axis=axis)
    return [(inputs[0], whole), (inputs[1], scale)], [node]


def _to_int4(name: str, weight: Array, axis: int) -> tuple[list[tuple[str, Array]], list[onnx.NodeProto]]:
    """Low halves of the bytes hold the first half of the blocks, high halves the second."""
    from onnx import TensorProto, helper

    rows = np.moveaxis(weight, axis, 0)
    flat = rows.reshape(rows.shape[0], -1)
    width = -(-flat.shape[1] // BLOCK) * BLOCK
    padded = np.zeros((flat.shape[0], width), np.float32)
    padded[:, : flat.shape[1]] = flat
    blocks = padded.reshape(-1, BLOCK)
    if len(blocks) % 2:
        blocks = np.concatenate([blocks, np.zeros((1, BLOCK), np.float32)])
    scale = np.maximum(np.abs(blocks).max(axis=1, keepdims=True) / 7, np.finfo(np.float32).tiny).astype(
        np.float32
    )
    whole = (np.rint(blocks / scale).clip(-7, 7) + 8).astype(np.uint8)
    half = len(whole) // 2
    packed = whole[:half] | (whole[half:] << 4)

    def constant(key: str, value: Array) -> tuple[str, Array]:
        return f"{name}.{key}", value

    tensors = [
        constant("int4", packed),
        constant("scale", scale),
        constant("four", np.array(4, np.uint8)),
        constant("mask", np.array(15, np.uint8)),
        constant("eight", np.array(8, np.float32)),
        constant("padded_shape", np.array([-1, width], np.int64)),
        constant("row_end", np.array([rows.shape[0], flat.shape[1]], np.int64)),
        constant("zero", np.zeros(2, np.int64)),
        constant("shape", np.array(rows.shape, np.int64)),
    ]

    def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
        names = [f"{name}.{key}" for key in inputs]
        target = output or name
        return helper.make_node(op, names, [target], name=f"{name}.expand.{op}", **attributes)

    last = np.moveaxis(np.empty(rows.shape, np.int8), 0, axis).shape != rows.shape or axis % weight.ndim != 0
    nodes = [
        node("BitwiseAnd", ("int4", "mask"), f"{name}.low"),
        node("BitShift", ("int4", "four"), f"{name}.high", direction="RIGHT"),
        node("Concat", ("low", "high"), f"{name}.nibbles", axis=0),
        node("Cast", ("nibbles",), f"{name}.float", to=TensorProto.FLOAT),
        node("Sub", ("float", "eight"), f"{name}.signed"),
        node("Mul", ("signed", "scale"), f"{name}.blocks"),
        node("Reshape", ("blocks", "padded_shape"), f"{name}.padded"),
        node("Slice", ("padded", "zero", "row_end"), f"{name}.rows"),
        node("Reshape", ("rows", "shape"), f"{name}.moved" if last else ""),
    ]
    nodes[-1].name += ".shape"
    if last:
        order = list(
            np.argsort([axis % weight.ndim, *(i for i in range(weight.ndim) if i != axis % weight.ndim)])
        )
        nodes.append(node("Transpose", ("moved",), "", perm=[int(i) for i in order]))
    return tensors, nodes


Convert = Callable[[str, Array], "tuple[list[tuple[str, Array]], list[onnx.NodeProto]]"]


def _replace(model: onnx.ModelProto, convert: Convert, wanted: Callable[[str], bool]) -> None:
    """Replace float32 initializers by what ``convert`` makes of them, computed right before their first use."""
    from onnx import TensorProto, numpy_helper

    expand: dict[str, list[onnx.NodeProto]] = {}
    kept: list[onnx.TensorProto] = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or array.nbytes <= INLINE_BYTES or not wanted(tensor.name):
            kept.append(tensor)
            continue
        tensors, expand[tensor.name] = convert(tensor.name, array)
        kept.extend(numpy_helper.from_array(value, key) for key, value in tensors)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        for name in node.input:
            nodes.extend(expand.pop(name, []))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
