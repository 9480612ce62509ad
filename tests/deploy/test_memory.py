"""Memory that runtimes take beside the weights that the runner reads: counted, or held once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sigmab_plugin.deploy.backends import Bound
from sigmab_plugin.deploy.manifest import FileEntry, Manifest, Node, Region, TensorEntry, Value
from sigmab_plugin.deploy.storage import fresh_memory

linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps")


def _anonymous() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"^Anonymous:\s+(\d+) kB", text, re.MULTILINE)[0])


def _matrix(side: int) -> Node:
    """A leaf with one float16 matrix as its weights."""
    nbytes = 2 * side * side
    region = Region("w", 0, nbytes, nbytes, "", (TensorEntry("half", "float16", (side, side), 0, nbytes),))
    value = (Value("x", "float32", (None, side)),), (Value("y", "float32", (None, side)),)
    return Node("", "root", "leaf", (), *value, FileEntry("p", 0, ""), region, 0)


@linux
def test_sessions_share_what_their_graphs_expand_weights_into() -> None:
    """Eight nodes widen 8 MB to 16 MB each, one after the other: 16 MB stay, not 128."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from sigmab_plugin.deploy.backends.onnxruntime import OnnxRuntime

    side = 2048
    helper, kind = onnx.helper, onnx.TensorProto
    steps = [
        helper.make_node("Cast", ["half"], ["w"], to=kind.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    values = {"half": kind.FLOAT16, "x": kind.FLOAT, "y": kind.FLOAT}
    x, half, y = (helper.make_tensor_value_info(n, values[n], [None, side]) for n in ("x", "half", "y"))
    graph = helper.make_graph(steps, "node", [x, half], [y])
    data = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    ).SerializeToString()

    node = _matrix(side)
    backend = OnnxRuntime(Manifest("onnx", "fp16", "portable", "vectors", (node,), ("",)), threads=1)
    bound = [backend.bind(node, backend.program(node, data), None) for _ in range(8)]
    inputs = (np.ones((1, side), np.float32),)
    before = _anonymous()
    for _ in range(2):
        for run in bound:
            assert run(inputs)[0].shape == (1, side)
    assert _anonymous() - before < 8 * node.weights.nbytes


@linux
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_openvino_takes_what_is_counted(precision: str, tmp_path: Path) -> None:
    """Float16 constants are widened, and repacked then."""
    ov = pytest.importorskip("openvino")
    from sigmab_plugin.deploy.backends.openvino import OpenVino

    side = 1536
    ops = ov.opset13
    x = ops.parameter([-1, side], np.float32)
    constant = ops.constant(np.ones((side, side), np.float16 if precision == "fp16" else np.float32))
    w = ops.convert(constant, "f32") if precision == "fp16" else constant
    ov.serialize(ov.Model([ops.matmul(x, w, False, False)], [x], "node"), tmp_path / "p.xml", tmp_path / "w")
    program, weights = (tmp_path / "p.xml").read_bytes(), (tmp_path / "w").read_bytes()

    node = _matrix(side)
    backend = OpenVino(Manifest("openvino", precision, "portable", "vectors", (node,), ("",)), threads=1)
    inputs = (np.ones((1, side), np.float32),)
    bound: list[Bound] = []
    before = 0
    for _ in range(5):  # the first one also takes what the plug-in takes once
        memory = fresh_memory(len(weights))
        memory[:] = weights
        bound.append(backend.bind(node, program, memory))
        del memory
        bound[-1](inputs)
        before = before or _anonymous()
    taken = (_anonymous() - before) / 4 / len(weights)
    assert taken < 1.25 * backend.resident_factor
