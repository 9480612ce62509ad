"""ONNX artefacts: ``.graph`` takes the weights as inputs, ``.onnx`` is the same graph with external data."""

from __future__ import annotations

from typing import Any

from ..bundle import Artefact, Options
from ..manifest import Region
from ..nodes import NodeSource
from ..onnx_graph import export_node, optimise, take_weights, vector_width, with_external_data

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def export_artefact(source: NodeSource, options: Options) -> Artefact:
    model = export_node(source, modality=options.modality)
    if options.precision == "int8":
        from ..quantization import quantize_static

        assert options.calibration is not None
        model = quantize_static(model, source, options.calibration[source.path])
    elif options.precision.endswith("-weights"):
        from ..quantization import quantize_weights

        model = quantize_weights(model, bits=4 if options.precision.startswith("int4") else 8)
    native = options.layout == "native"
    if native or options.precision == "int8":  # integer kernels come from fusion, which needs the weights
        model = optimise(model, native=native)
    if options.precision == "fp16":
        from ..quantization import store_half

        store_half(model, source)
    tensors = take_weights(model)

    def companions(region: Region) -> dict[str, bytes]:
        return {".onnx": with_external_data(model, region).SerializeToString()}

    return Artefact(model.SerializeToString(), ".graph", tensors, companions)


def requires(options: Options) -> dict[str, Any]:
    """What the machine that runs the bundle must offer."""
    return {"vector_width": vector_width()} if options.layout == "native" else {}
