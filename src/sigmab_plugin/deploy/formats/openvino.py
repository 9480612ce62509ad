"""OpenVINO artefacts: the graph as IR (``.xml``), its constants repacked in order of use as the weights."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ..bundle import Artefact, Options
from ..nodes import NodeSource
from ..onnx_graph import export_node, require
from ..writing import RawTensor, pack

LIBRARIES = ("openvino", "onnx", "onnxscript")

#: OpenVINO's element types -> the manifest's.
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
}


def export_artefact(source: NodeSource, options: Options) -> Artefact:
    ov = require("openvino")
    graph = export_node(source, modality=options.modality)
    if options.precision == "fp16":  # OpenVINO's own compression clips what float16 cannot hold
        from ..quantization import store_half

        store_half(graph, source)
    model = ov.Core().read_model(graph.SerializeToString(), b"")
    if len(model.inputs) != len(source.inputs):
        raise ModelError(
            f"{source} cannot be exported to OpenVINO: it takes {len(source.inputs)} inputs "
            f"({', '.join(source.inputs)}) and uses {len(model.inputs)}; OpenVINO drops the others"
        )
    for port, name in zip(model.inputs, source.inputs, strict=True):
        port.get_tensor().set_names({name})
    with tempfile.TemporaryDirectory(prefix="sigmab-") as work:
        file = Path(work) / "node.xml"
        ov.save_model(model, str(file), compress_to_fp16=False)
        return repack(file.read_bytes(), file.with_suffix(".bin").read_bytes())


def repack(xml: bytes, constants: bytes) -> Artefact:
    """Lay the constants out as a region and point the graph at their new offsets."""
    root = ET.fromstring(xml)
    found: dict[tuple[int, int], list[ET.Element]] = {}
    tensors: list[RawTensor] = []
    for layer in root.iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        offset, size = int(data.get("offset", "0")), int(data.get("size", "0"))
        if (offset, size) not in found:  # equal constants are stored once
            kind = data.get("element_type", "")
            shape = tuple(int(n) for n in data.get("shape", "").split(",") if n.strip())
            name = layer.get("name", f"constant_{len(tensors)}")
            tensors.append((name, _DTYPES.get(kind, kind), shape, constants[offset : offset + size]))
        found.setdefault((offset, size), []).append(data)
    _, _, entries = pack(tensors)
    for elements, entry in zip(found.values(), entries, strict=True):
        for data in elements:
            data.set("offset", str(entry.offset))
    return Artefact(ET.tostring(root, encoding="utf-8", xml_declaration=True), ".xml", tensors)


def requires(options: Options) -> dict[str, Any]:
    return {}
