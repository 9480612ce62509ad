"""Every format and precision: export, run, compare with hard routing; the graphs hold what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.deploy import Runner, export, export_chain, export_single_file, read_manifest
from sigmab_plugin.errors import CalibrationError, FormatError, ModelError, SigmaBError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

Expected = tuple[Tensor, Tensor]


def logits_of(
    directory: Path, images: Tensor, **options: Any
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    with Runner(directory, threads=1, **options) as runner:
        result = runner.run(images)
        singles = np.concatenate([runner(image[None]) for image in images[:5]])
    np.testing.assert_allclose(singles, result.logits[:5], atol=1e-6)
    return result.logits, result.leaves


@pytest.mark.slow
def test_onnx_runtime_agrees_with_torch(onnx_bundle: Path, images: Tensor, expected: Expected) -> None:
    logits, leaves = logits_of(onnx_bundle, images)
    np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-4)
    np.testing.assert_array_equal(leaves, expected[1].numpy())


def left_in_graphs(directory: Path) -> set[str]:
    """Initializers of one or more dimensions in the programs, other than integers (shapes, axes)."""
    return {
        f"{node.path}: {tensor.name}"
        for node in read_manifest(directory).nodes
        for tensor in onnx.load(
            str(directory / node.program.file), load_external_data=False
        ).graph.initializer
        if tensor.dims and tensor.data_type != onnx.TensorProto.INT64
    }


@pytest.mark.slow
def test_a_nodes_region_holds_all_its_weights(onnx_bundle: Path, net: Any) -> None:
    """The router's few numbers too: whoever reads the region has the node."""
    assert left_in_graphs(onnx_bundle) == set()
    node = read_manifest(onnx_bundle).node("0")
    data = (onnx_bundle / node.weights.file).read_bytes()
    stored = {
        t.name: np.frombuffer(data[t.offset : t.offset + t.nbytes], t.dtype).reshape(t.shape)
        for t in node.weights.tensors
    }
    for name, value in net.routers["0"].state_dict().items():
        np.testing.assert_array_equal(stored[f"router.{name}"], value.numpy())


def test_scales_of_resizing_and_shapes_are_part_of_the_program() -> None:
    from onnx import TensorProto, helper, numpy_helper

    from sigmab_plugin.deploy.onnx_graph import take_weights

    then, other = (
        helper.make_graph(
            [helper.make_node("Mul", ["y", name], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)],
        )
        for name in ("w1", "w2")
    )
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["y"]),
        helper.make_node("If", ["c"], ["z"], then_branch=then, else_branch=other),
        helper.make_node("Reshape", ["z", "shape"], ["out"]),
    ]
    constants = {
        "w2": np.ones(1, np.float32),
        "w1": np.ones(2, np.float32),
        "scales": np.ones(4, np.float32),
        "shape": np.array([-1]),
        "c": np.array(True),
        "table": np.arange(100),
    }
    nodes.append(helper.make_node("Gather", ["table", "shape"], ["index"]))
    graph = helper.make_graph(
        nodes, "g", [], [], [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    model = helper.make_model(graph)
    assert [name for name, *_ in take_weights(model)] == ["w2", "w1", "table"]  # equal places: as they came
    assert [value.name for value in model.graph.input] == ["w2", "w1", "table"]
    assert {t.name for t in model.graph.initializer} == {"scales", "shape", "c"}


def test_kept_biases_let_the_runtime_fuse_integer_kernels(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    from sigmab_plugin.deploy.onnx_graph import take_weights

    rng = np.random.default_rng(0)
    constants = {
        "scale": np.float32(0.05),
        "zero": np.uint8(100),
        "weight": rng.integers(-127, 127, (16, 8, 3, 3)).astype(np.int8),
        "weight_scale": rng.uniform(1e-3, 2e-3, 16).astype(np.float32),
        "weight_zero": np.zeros(16, np.int8),
        "bias": rng.normal(size=16).astype(np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bias"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "scale", "zero"], ["out"]),
    ]
    found = {}
    for keep in (True, False):
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 9, 9])],
            [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        taken = [name for name, *_ in take_weights(model, fusible=keep)]
        assert taken == (["weight"] if keep else ["weight", "weight_scale", "weight_zero", "bias"])
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / f"{keep}.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found[keep] = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert "QLinearConv" in found[True]
    assert "QLinearConv" not in found[False]


@pytest.mark.slow
def test_each_node_is_also_an_ordinary_onnx_file(onnx_bundle: Path, net: Any, images: Tensor) -> None:
    """``.onnx`` with external data in the same region, for tools that know nothing of bundles."""
    manifest = read_manifest(onnx_bundle)
    frontier = images[:3].numpy()
    for node in manifest.path_nodes("0/1"):
        file, _, _ = node.extra["files"]["onnx"]
        onnx.checker.check_model(str(onnx_bundle / file))
        session = ort.InferenceSession(str(onnx_bundle / file), providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == [v.name for v in node.inputs]
        frontier = session.run(None, {node.inputs[0].name: frontier})[0]
    with torch.no_grad():
        value = net.specializers["0_1"](net.specializers["0"](net.backbone(images[:3])))
        np.testing.assert_allclose(frontier, net.heads["0_1"](value).numpy(), atol=1e-5)


@pytest.mark.slow
def test_openvino_agrees_with_torch(net: Any, images: Tensor, expected: Expected, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    export(net, images[:2], tmp_path / "b", format="openvino")
    budget = 2 * max(read_manifest(tmp_path / "b").path_bytes().values())  # the plug-in keeps a second copy
    logits, leaves = logits_of(tmp_path / "b", images, budget_bytes=budget)
    np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-4)
    np.testing.assert_array_equal(leaves, expected[1].numpy())


def single_files_weights(file: Path) -> set[str]:
    model = onnx.load(str(file), load_external_data=False)
    tensors = onnx.external_data_helper._get_all_tensors(model)
    return {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}


@pytest.mark.slow
def test_single_file_agrees_with_torch(net: Any, images: Tensor, expected: Expected, tmp_path: Path) -> None:
    file = export_single_file(net, images[:1], tmp_path / "net.onnx")
    weights = single_files_weights(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["net.onnx", *weights])
    onnx.checker.check_model(str(file))
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    logits = np.concatenate([session.run(None, {"input": x[None].numpy()})[0] for x in images])
    np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-4)
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = np.concatenate([compiled([x[None].numpy()])[0] for x in images])
    np.testing.assert_allclose(logits, expected[0].numpy(), atol=1e-4)


def part() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(80, 10),
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "layout", "error", "stored"),
    [
        ("fp32", "native", 1e-4, 4),
        ("fp16", "portable", 2e-3, 2),
        ("fp16", "native", 2e-3, 2),
        ("int8-weights", "portable", 2e-2, 1),
        ("int4-weights", "portable", 0.2, 0.75),
    ],
)
def test_precisions(precision: str, layout: str, error: float, stored: float, tmp_path: Path) -> None:
    """Relative error of the logits, and bytes per weight with the scales (one per 32 weights at 4 bits)."""
    model = part()
    x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    manifest = export_chain([model], x, tmp_path / "b", precision=precision, layout=layout)
    with torch.no_grad():
        wanted = model(x).numpy()
    with Runner(tmp_path / "b", threads=1) as runner:
        logits = runner(x)
    assert np.abs(logits - wanted).max() / np.abs(wanted).max() < error
    assert left_in_graphs(tmp_path / "b") == set()
    if layout == "portable":
        weights = 20 * 27 + 800
        small = 2 * (128 + 64)  # biases, and the scales of 8 bits: 20 and 10 numbers on cache lines
        assert manifest.nodes[0].weights.used <= stored * weights + small + 300


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx", "openvino"])
def test_fp16_keeps_what_does_not_fit(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers past 65504 would become infinite, or be clipped, without a word."""
    pytest.importorskip("openvino" if form == "openvino" else "torch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 8)).eval()
    with torch.no_grad():
        model[1].running_var.fill_(1e5)  # its square root is an ordinary number
        model[3].weight[0, 0] = 2e5
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 300
    export_chain([model], x, tmp_path / "b", format=form, precision="fp16")
    assert "node 'root' (leaf): numbers past float16's 65504 stay in float32: body.3.weight" in caplog.text
    with torch.no_grad():
        wanted = model(x).numpy()
    with Runner(tmp_path / "b", threads=1) as runner:
        assert np.abs(runner(x) - wanted).max() < 2e-3 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch", "onnx", "openvino"])
def test_fp16_stores_routers_in_float32(form: str, net: Any, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("openvino" if form == "openvino" else "torch")
    manifest = export(net, images[:2], tmp_path / "b", format=form, precision="fp16")
    stored = {t.name: t for t in manifest.node("0").weights.tensors}
    wide = {name for name, t in stored.items() if t.dtype == "float32"}
    assert any(t.dtype == "float16" for name, t in stored.items() if name.startswith("body."))
    assert not any(t.dtype == "float16" for name, t in stored.items() if name.startswith("router."))
    if form == "torch":
        assert {n for n in stored if n.startswith("router.") or "running_" in n} == wide


@pytest.mark.slow
def test_a_native_layout_is_refused_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_chain([part()], torch.zeros(2, 3, 12, 12), tmp_path / "b", layout="native")
    manifest = (tmp_path / "b" / "manifest.json").read_text()
    width = read_manifest(tmp_path / "b").requires["vector_width"]
    other = {8: 16}.get(width, 8)
    (tmp_path / "b" / "manifest.json").write_text(
        manifest.replace(f'"vector_width": {width}', f'"vector_width": {other}')
    )
    with pytest.raises(FormatError, match=f"vectors of {other} floats, this machine has {width}"):
        Runner(tmp_path / "b")


@pytest.mark.slow
def test_static_int8_is_calibrated_leaf_by_leaf(
    net: Any, images: Tensor, expected: Expected, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CalibrationError, match="no calibration sample reaches"):
        export(net, images[:2], tmp_path / "b", precision="int8", calibration_data=[images[:1]])
    caplog.clear()
    manifest = export(net, images[:2], tmp_path / "b", precision="int8", calibration_data=[images])
    assert not [r for r in caplog.records if r.name in ("root", "onnx_ir") and r.levelname != "DEBUG"]
    assert not [r for r in caplog.records if r.name.startswith("onnx_ir.")]
    graph = onnx.load(str(tmp_path / "b" / manifest.node("0/0").program.file), load_external_data=False).graph
    assert sum(node.op_type == "QLinearConv" for node in graph.node) == 2
    assert {t.dtype for t in manifest.node("0/0").weights.tensors} <= {"int8", "int32", "float32"}
    assert left_in_graphs(tmp_path / "b") == set()
    logits, leaves = logits_of(tmp_path / "b", images)
    same = leaves == expected[1].numpy()
    assert same.mean() > 0.8
    scale = np.abs(expected[0].numpy()).max()
    assert np.abs(logits - expected[0].numpy())[same].max() < 0.05 * scale


class _NoOnnx(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.lstsq(x.transpose(0, 1) @ x, x.transpose(0, 1)).solution.transpose(0, 1)


@pytest.mark.slow
def test_an_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"node 'root' \(backbone\) cannot be exported to ONNX: .*lstsq"):
        export_chain([_NoOnnx(), nn.Linear(3, 2)], torch.randn(4, 3), tmp_path / "b")


@pytest.mark.slow
def test_compiled_torch_agrees_with_torch(bundle: Path, images: Tensor, expected: Expected) -> None:
    with Runner(bundle, backend="torch-compiled", threads=1) as runner:
        try:
            result = runner.run(images)
        except SigmaBError as error:
            pytest.skip(f"torch.compile does not work here: {error}")
        for image in images[:6]:
            runner.drop()  # other memory, same program
            single = runner.run(image[None])
        np.testing.assert_allclose(single.logits, expected[0][5:6].numpy(), atol=1e-4)
    np.testing.assert_allclose(result.logits, expected[0].numpy(), atol=1e-4)
    np.testing.assert_array_equal(result.leaves, expected[1].numpy())


def test_a_failing_compiler_names_the_node(
    bundle: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(program: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise RuntimeError("No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with (
        Runner(bundle, backend="torch-compiled") as runner,
        pytest.raises(SigmaBError, match=r"node 'root': torch\.compile failed: .*No working C\+\+ compiler"),
    ):
        runner(images[:1])
