"""The single-file form: one ONNX graph with a nested ``If`` per router, weights in one file beside it.

For those who need one model. It serves one sample a call, and which pages of the other branches a runtime
touches is the runtime's choice; the split form and its runner do not leave it to chance.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, FormatError, ModelError
from ..modes import evaluating
from .nodes import NodeSource, check_net, cut
from .onnx_graph import INLINE_BYTES, export_node, require
from .writing import BundleWriter

if TYPE_CHECKING:
    import onnx

#: Format -> how its file's name ends, and the libraries it takes.
FORMATS = {"onnx": (".onnx", ("onnx",)), "openvino": (".xml", ("onnx", "openvino"))}


def export_single_file(
    net: Any,
    example_inputs: Any,
    file: str | Path,
    *,
    format: str = "onnx",  # noqa: A002 - the field's word
    overwrite: bool = False,
) -> Path:
    """Write ``net`` with hard routing as one model for batches of one.

    Args:
        net: a SigmaB net; it is left as it was.
        example_inputs: a batch, or a tuple of positional arguments.
        file: ``model.onnx`` with ``model.HASH.weights`` beside it, named by its content, or ``model.xml`` with
            ``model.bin``.
        format: "onnx", or "openvino" (converted from the former).
        overwrite: replace files that exist; the weights that an earlier ``model.onnx`` used go with it.

    Returns:
        ``file``. Each file appears whole or not at all, the graph last.

    Raises:
        ConfigError: an unknown format, or a file name that does not end as the format's files do.
        ModelError: ``net`` is no SigmaB net, or a node cannot be exported, or takes a ragged batch; the message
            names it and why.
        FormatError: ``file`` exists and ``overwrite`` is off.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    file = Path(file)
    suffix, libraries = FORMATS[format]
    if file.suffix != suffix or file.is_dir():
        raise ConfigError(
            f"format={format!r} writes a file {file.stem or 'model'}{suffix}; got {str(file)!r}"
        )
    for existing in (file, *([file.with_suffix(".bin")] if format == "openvino" else [])):
        if existing.exists() and not overwrite:
            raise FormatError(f"{existing} exists: pass overwrite=True (--overwrite) to replace it")
    check_net(net)
    for name in libraries:
        require(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with evaluating(net):
        sources = {source.path: source for source in cut(net, example_inputs)}
        modality = net.modality.name
        models = {path: export_node(source, modality=modality) for path, source in sources.items()}
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as work:
        model = _assemble(sources, models, BundleWriter(Path(work), packed=True))
        if format == "openvino":
            ov = require("openvino")
            (Path(work) / "model.onnx").write_bytes(model.SerializeToString())
            converted = ov.Core().read_model(str(Path(work) / "model.onnx"))
            ov.save_model(converted, str(Path(work) / file.name), compress_to_fp16=False)
            names = [file.with_suffix(".bin").name, file.name]
        else:
            # Named by its content: a graph that was not replaced keeps the weights that belong to it.
            content = hashlib.sha256((Path(work) / "weights.bin").read_bytes()).hexdigest()
            names = [f"{file.stem}.{content[:8]}.weights", file.name]
            os.rename(Path(work) / "weights.bin", Path(work) / names[0])
            _point_to(model.graph, names[0])
            (Path(work) / file.name).write_bytes(model.SerializeToString())
        for name in names:
            with open(Path(work) / name, "rb") as written:
                os.fsync(written.fileno())
            os.replace(Path(work) / name, file.parent / name)
    if format == "onnx" and overwrite:
        earlier = re.compile(re.escape(file.stem) + r"\.[0-9a-f]{8}\.weights")
        for path in file.parent.iterdir():
            if earlier.fullmatch(path.name) and path.name != names[0]:
                path.unlink()
    return file


def _point_to(graph: onnx.GraphProto, weights: str) -> None:
    """Name the file of all external data, nested graphs included."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = weights
    for node in graph.node:
        for attribute in node.attribute:
            _point_to(attribute.g, weights)


def _assemble(
    sources: dict[str, NodeSource], models: dict[str, onnx.ModelProto], writer: BundleWriter
) -> onnx.ModelProto:
    from onnx import helper

    root = sources[""]
    if len({t.shape[0] for t in root.output_example}) > 1:
        raise ModelError(
            f"{root} hands on a ragged batch, which the single-file form cannot hold: use export()"
        )
    graph = _graph("", sources, models, {}, writer)
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 1
    model = models[""]
    domains = {entry.domain: entry for m in models.values() for entry in m.opset_import}
    assembled = helper.make_model(graph, opset_imports=list(domains.values()), ir_version=model.ir_version)
    assembled.producer_name = "sigmab-plugin"
    return assembled


def _graph(
    path: str,
    sources: dict[str, NodeSource],
    models: dict[str, onnx.ModelProto],
    outer: dict[str, str],
    writer: BundleWriter,
) -> onnx.GraphProto:
    """The graph of a node and everything below it. ``outer`` renames its inputs to values of its parent."""
    from onnx import TensorProto, helper, numpy_helper

    source, model = sources[path], models[path]
    if model.functions:
        raise ModelError(
            f"{source} was exported with local functions, which cannot be nested: {model.functions[0].name}"
        )
    prefix = f"{source.key}."
    names = {**{name: prefix + name for name in _names(model.graph)}, **outer}
    if not path:  # the model's own inputs keep their names
        names.update({value.name: value.name for value in model.graph.input})
    nodes = [_renamed(node, names, prefix) for node in model.graph.node]
    initializers: list[onnx.TensorProto] = []
    order: dict[str, int] = {}
    for position, node in enumerate(model.graph.node):
        for name in node.input:
            order.setdefault(name, position)
    large = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes <= INLINE_BYTES:
            initializers.append(numpy_helper.from_array(array, names[tensor.name]))
        else:
            large.append((order.get(tensor.name, 0), names[tensor.name], tensor.data_type, array))
    large.sort(key=lambda item: item[0])
    region = writer.weights(
        source.key,
        [(name, a.dtype.name, a.shape, np.ascontiguousarray(a).tobytes()) for _, name, _, a in large],
    )
    for (_, name, kind, array), entry in zip(large, region.tensors, strict=True):
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        where = {"location": region.file, "offset": region.offset + entry.offset, "length": entry.nbytes}
        for key, setting in where.items():
            tensor.external_data.add(key=key, value=str(setting))
        initializers.append(tensor)
    outputs = [names[value.name] for value in model.graph.output]
    inputs = [] if path else [value for value in model.graph.input if value.name in source.inputs]
    kind, shape = _type_of(models[_first_leaf(path, sources)].graph.output[0])
    final = "logits" if not path else f"{prefix}logits_out"
    if not source.children:
        nodes.append(helper.make_node("Identity", [outputs[0]], [final], name=f"{prefix}out"))
    else:
        frontier = outputs[:-1]
        below = []
        for child in source.children:
            received = [value.name for value in models[child].graph.input]
            renamed = dict(zip(received, frontier, strict=True))
            below.append(_graph(child, sources, models, renamed, writer))
        nodes.extend(_choice(prefix, outputs[-1], final, below))
        initializers.extend(
            [
                numpy_helper.from_array(np.array(0, np.int64), f"{prefix}zero"),
                numpy_helper.from_array(np.array(1, np.int64), f"{prefix}one"),
                numpy_helper.from_array(np.zeros(0, np.int64), f"{prefix}scalar"),
            ]
        )
    result = helper.make_tensor_value_info(final, kind, shape)
    return helper.make_graph(nodes, source.key, inputs, [result], initializers)


def _choice(prefix: str, logits: str, final: str, below: list[onnx.GraphProto]) -> list[onnx.NodeProto]:
    """If the router prefers branch 1 then that graph, else (ties too, as argmax) branch 0."""
    from onnx import helper

    nodes = []
    for branch, position in enumerate(("zero", "one")):
        nodes.append(
            helper.make_node("Gather", [logits, f"{prefix}{position}"], [f"{prefix}score{branch}"], axis=1)
        )
    return [
        *nodes,
        helper.make_node("Greater", [f"{prefix}score1", f"{prefix}score0"], [f"{prefix}prefer"]),
        helper.make_node("Reshape", [f"{prefix}prefer", f"{prefix}scalar"], [f"{prefix}condition"]),
        helper.make_node(
            "If", [f"{prefix}condition"], [final], f"{prefix}if", then_branch=below[1], else_branch=below[0]
        ),
    ]


def _names(graph: onnx.GraphProto) -> set[str]:
    found = {value.name for value in (*graph.input, *graph.output)} | {t.name for t in graph.initializer}
    for node in graph.node:
        found.update(node.input)
        found.update(node.output)
    return found - {""}


def _renamed(node: onnx.NodeProto, names: dict[str, str], prefix: str) -> onnx.NodeProto:
    copy = type(node)()
    copy.CopyFrom(node)
    if any(attribute.HasField("g") for attribute in copy.attribute):
        raise ModelError(
            f"operation {node.op_type} of {prefix!r} holds a graph of its own, which cannot be nested"
        )
    copy.name = f"{prefix}{node.name}"
    for field in (copy.input, copy.output):
        renamed = [names.get(name, name) for name in field]
        del field[:]
        field.extend(renamed)
    return copy


def _type_of(value: onnx.ValueInfoProto) -> tuple[int, list[Any]]:
    tensor = value.type.tensor_type
    return tensor.elem_type, [1, *(d.dim_value for d in tensor.shape.dim[1:])]


def _first_leaf(path: str, sources: dict[str, NodeSource]) -> str:
    while sources[path].children:
        path = sources[path].children[0]
    return path
