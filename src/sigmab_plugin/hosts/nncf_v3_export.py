"""Bundles of quantized networks: what NNCF's functions made, one artefact per node, for OpenVINO or ONNX Runtime.

``sigmab_plugin.deploy.export`` goes through ``torch.export``, which NNCF's hooks do not pass; these bundles are traced
by TorchScript instead and run in the same :class:`~sigmab_plugin.deploy.Runner`.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..deploy.bundle import Artefact, Options, write_bundle
from ..deploy.manifest import Manifest, Region
from ..deploy.nodes import NodeSource, chain, cut
from ..errors import ConfigError
from ..modes import evaluating
from ..tree.net import SigmaBNet
from .nncf_v3_parts import as_inputs
from .nncf_v3_state import strip


def export(
    network: nn.Module,
    example_inputs: Any,
    directory: str | Path,
    *,
    format: str = "openvino",  # noqa: A002 - the field's word
    overwrite: bool = False,
) -> Manifest:
    """Strip ``network`` and write it as a bundle for :class:`~sigmab_plugin.deploy.Runner`.

    Args:
        network: from :func:`~sigmab_plugin.hosts.nncf_v3.compress`; left as it was. A SigmaB net is written as one
            artefact per node, any other network as one artefact.
        example_inputs: a batch of two or more, or a tuple of positional arguments.
        format: ``"openvino"``, or ``"onnx"`` (QuantizeLinear / DequantizeLinear, weights stored as int8).

    Raises:
        ConfigError: another format.
        ImportError: the format's library is not installed.
    """
    exporters: dict[str, Any] = {"openvino": _OpenVino(), "onnx": _Onnx()}
    if format not in exporters:
        raise ConfigError(f"format must be 'openvino' or 'onnx'; got {format!r}")
    example = as_inputs(example_inputs)
    network.eval()
    stripped = strip(network, example)
    with evaluating(stripped):
        if isinstance(stripped, SigmaBNet):
            sources, leaves = cut(stripped, example), tuple(stripped.leaves)
            modality, plan = stripped.modality.name, stripped.plan.to_dict()
        else:
            sources = chain([stripped], example)
            leaves, modality, plan = (sources[-1].path,), "images", None
        options = Options(format, "int8", "portable", modality)
        return write_bundle(
            sources, leaves, plan, options, directory, overwrite=overwrite, exporter=exporters[format]
        )


class _OpenVino:
    LIBRARIES = ("openvino", "nncf")

    def export_artefact(self, source: NodeSource, options: Options) -> Artefact:
        import openvino as ov

        from ..deploy.formats.openvino import repack

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ov.convert_model(source.module, example_input=source.example)
        for port, name in zip(model.inputs, source.inputs, strict=True):
            port.get_tensor().set_names({name})
        with tempfile.TemporaryDirectory(prefix="sigmab-") as work:
            file = Path(work) / "node.xml"
            ov.save_model(model, str(file), compress_to_fp16=False)
            return repack(file.read_bytes(), file.with_suffix(".bin").read_bytes())

    def requires(self, options: Options) -> dict[str, Any]:
        return {}


class _Onnx:
    LIBRARIES = ("onnx", "onnxruntime", "nncf")

    def export_artefact(self, source: NodeSource, options: Options) -> Artefact:
        import onnx

        from ..deploy.onnx_graph import take_weights, with_external_data

        names = (*source.inputs, *source.outputs)
        with tempfile.TemporaryDirectory(prefix="sigmab-") as work, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = str(Path(work) / "node.onnx")
            torch.onnx.export(
                source.module,
                source.example,
                file,
                dynamo=False,
                input_names=list(source.inputs),
                output_names=list(source.outputs),
                dynamic_axes={name: {0: f"rows_{i}"} for i, name in enumerate(names)},
                opset_version=17,
            )
            model = onnx.load(file)
        fold_weights(model)
        tensors = take_weights(model, fusible=True)

        def companions(region: Region) -> dict[str, bytes]:
            return {".onnx": with_external_data(model, region).SerializeToString()}

        return Artefact(model.SerializeToString(), ".graph", tensors, companions)

    def requires(self, options: Options) -> dict[str, Any]:
        return {}


def fold_weights(model: Any) -> int:
    """Store what QuantizeLinear makes of a constant instead of the constant, in place; returns how many."""
    import numpy as np
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    kept, folded = [], 0
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or any(name not in constants for name in node.input):
            kept.append(node)
            continue
        value, scale, zero = (constants[name] for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis % value.ndim else 1 for i in range(value.ndim)] if scale.ndim else []
        limits = np.iinfo(zero.dtype)
        steps = np.rint(value / scale.reshape(shape)) + zero.reshape(shape).astype(np.float32)
        stored = np.clip(steps, limits.min, limits.max).astype(zero.dtype)
        model.graph.initializer.append(numpy_helper.from_array(stored, node.output[0]))
        folded += 1
    del model.graph.node[:]
    model.graph.node.extend(kept)
    used = {name for node in kept for name in node.input}
    remaining = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(remaining)
    return folded
