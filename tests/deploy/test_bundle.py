"""What lies in a bundle, and how it comes to lie there."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.deploy import Manifest, Runner, export, export_chain, export_single_file, read_manifest
from sigmab_plugin.deploy.manifest import ALIGNMENT, MODALITIES, PAGE
from sigmab_plugin.deploy.nodes import cut
from sigmab_plugin.deploy.quantization import collect
from sigmab_plugin.deploy.writing import atomic_directory, pack
from sigmab_plugin.errors import CalibrationError, ConfigError, FormatError, ModelError
from sigmab_plugin.modes import evaluating
from sigmab_plugin.tree.modality import _KINDS


def test_nodes_are_the_tree_in_order_of_use(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert [n.path for n in manifest.nodes] == ["", "0", "0/0", "0/1", "1", "1/0", "1/1"]
    assert [n.role for n in manifest.path_nodes("1/0")] == ["backbone", "inner", "leaf"]
    assert manifest.plan == {"version": 1, "levels": ["a", "b"]}
    body = json.loads((bundle / "manifest.json").read_text())
    assert body["paths"]["1/0"] == {
        "leaf": 2,
        "nodes": ["", "1", "1/0"],
        "nbytes": sum(n.weights.nbytes for n in manifest.path_nodes("1/0")),
    }


def test_one_seek_and_one_read_bring_a_nodes_weights(bundle: Path, net: Any) -> None:
    """What a runner in C does: offset and length from the manifest, nothing else."""
    node = json.loads((bundle / "manifest.json").read_text())["nodes"][1]
    where = node["weights"]
    file = os.open(bundle / where["file"], os.O_RDONLY)
    os.lseek(file, where["offset"], os.SEEK_SET)
    data = os.read(file, where["nbytes"])
    os.close(file)
    assert where["offset"] % PAGE == 0
    assert where["nbytes"] % PAGE == 0
    assert hashlib.sha256(data).hexdigest() == where["sha256"]
    expected = dict(net.specializers["0"].named_parameters())
    for name, dtype, shape, offset, nbytes in where["tensors"]:
        assert offset % ALIGNMENT == 0
        value = np.frombuffer(data[offset : offset + nbytes], dtype).reshape(shape)
        if name.startswith("body.") and name[5:] in expected:
            np.testing.assert_array_equal(value, expected.pop(name[5:]).detach().numpy())
    assert not expected


def test_bytes_on_a_path_are_its_parameters(net: Any, images: Tensor, tmp_path: Path) -> None:
    """Beyond the parameters: running statistics, alignment, and less than a page per node."""
    manifest = export(net, images, tmp_path / "b", format="torch", packed=True)
    counted = sum(p.numel() for p in net.backbone.parameters()) + sum(
        p.numel() for p in net.routers["root"].parameters()
    )
    assert manifest.node("").parameters == counted
    for node in manifest.nodes:
        assert 0 <= node.weights.nbytes - node.weights.used < PAGE
        assert node.weights.used >= 4 * node.parameters
    # Packed: one file, the nodes one after the other.
    ends = [n.weights.offset + n.weights.nbytes for n in manifest.nodes]
    assert [n.weights.offset for n in manifest.nodes] == [0, *ends[:-1]]
    assert (tmp_path / "b" / "weights.bin").stat().st_size == ends[-1]


def test_manifest_round_trip(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def _tensor(index: int, field: int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change a field of a tensor of node "0/0": 1 type, 2 shape, 3 offset, 4 bytes."""
    return lambda m: m["nodes"][2]["weights"]["tensors"][index].__setitem__(field, value)


def _codebook(**fields: Any) -> Callable[[dict[str, Any]], None]:
    described = {"block_size": 4, "nbytes": 4096, "tensors": [], "packed": [], **fields}
    return lambda m: m["nodes"][2]["extra"].update(codebook=described)


ALTERED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda m: m.update(version=2), "newer than the 1"),
    "negative-version": (lambda m: m.update(version=-3), "-3 is no bundle format version"),
    "foreign": (lambda m: m.update(type="zip"), "not a sigmab-bundle"),
    "modality": (lambda m: m.update(modality="sound"), "unknown modality 'sound'"),
    "missing-node": (lambda m: m["nodes"].pop(2), "0/0"),
    "duplicate-node": (lambda m: m["nodes"].append(dict(m["nodes"][2])), "node '0/0' is listed twice"),
    "escape": (lambda m: m["nodes"][0]["weights"].update(file="../x"), "plain file name"),
    "unaligned": (lambda m: m["nodes"][0]["weights"].update(offset=5), "not aligned to 4096"),
    "negative-offset": (lambda m: m["nodes"][2]["weights"].update(offset=-4096), "node '0/0': .* no region"),
    "negative-size": (lambda m: m["nodes"][2]["weights"].update(nbytes=-4096), "node '0/0': .* no region"),
    "outside": (_tensor(0, 4, 1 << 40), "node '0/0': tensor .* outside its region"),
    "shape": (_tensor(0, 2, [1, 2]), r"node '0/0': tensor .* float32 of shape \(1, 2\) has 8"),
    "negative-shape": (_tensor(0, 2, [-1, -2]), "node '0/0': tensor .* has shape"),
    "type": (_tensor(0, 1, "foo"), "node '0/0': tensor .* unknown type 'foo'"),
    "misaligned": (_tensor(0, 3, 8), "node '0/0': tensor .* not aligned to 64"),
    "overlap": (_tensor(1, 3, 0), "node '0/0': tensor .* overlaps"),
    "same-name": (
        lambda m: m["nodes"][2]["weights"]["tensors"][1].__setitem__(
            0, m["nodes"][2]["weights"]["tensors"][0][0]
        ),
        "node '0/0': two of its tensors",
    ),
    "cycle": (lambda m: m["nodes"][1].update(children=["0", "0/1"]), "node '0': '0' is not its child"),
    "repeated-child": (lambda m: m["nodes"][1].update(children=["0/1", "0/1"]), "'0/1' is not its child, or"),
    "no-children": (lambda m: m["nodes"][1].update(children=[]), "node '0': a leaf, and no other"),
    "one-child": (
        lambda m: m["nodes"][1].update(children=["0/0"]),
        "node '0/0' takes 1 inputs, node '0' hands",
    ),
    "no-leaves": (lambda m: m.update(leaves=[]), "leaves must be different paths"),
    "a-leaf-less": (lambda m: m["leaves"].pop(), "node '1/1': a leaf"),
    "no-inputs": (lambda m: m["nodes"][0].update(inputs=[]), "node 'root': it has no inputs"),
    "incomplete": (lambda m: m.pop("leaves"), "incomplete"),
    "infinite": (lambda m: m["nodes"][0].update(parameters=float("inf")), "incomplete or altered"),
    "codebook": (lambda m: m["nodes"][2].update(extra={"codebook": {}}), "node '0/0': its codebook"),
    "codebook-infinite": (_codebook(nbytes=float("inf")), "node '0/0': its codebook"),
    "codebook-negative": (_codebook(nbytes=-4096), "node '0/0': its codebook"),
    "codebook-shape": (
        _codebook(tensors=[["a", "float32", [float("inf")], 0, 4]]),
        "node '0/0': its codebook",
    ),
    "codebook-blocks": (_codebook(block_size=0), "node '0/0': its codebook"),
    "codebook-unpacked": (_codebook(packed=None), "node '0/0': its codebook"),
    "codebook-other": (_codebook(packed=["b"]), "node '0/0': its codebook.*no tensors"),
    "fraction": (lambda m: m["nodes"][2]["weights"].update(nbytes=4096.7), "4096.7 is no whole number"),
    "truth": (lambda m: m["nodes"][2].update(parameters=True), "True is no whole number"),
    "negative-parameters": (lambda m: m["nodes"][2].update(parameters=-5), "node '0/0': -5 parameters"),
    "page": (lambda m: m.update(page=512), "pages of 512"),
    "parent": (lambda m: m["nodes"][0]["program"].update(file=".."), "plain file name"),
    "no-name": (lambda m: m["nodes"][0]["program"].update(file=""), "plain file name"),
    "nul": (lambda m: m["nodes"][0]["weights"].update(file="a\0b"), "plain file name"),
    "runtime-type": (
        _tensor(0, 1, "u32"),
        "node '0/0': tensor .* has type 'u32', which format 'torch' lacks",
    ),
    "output-names": (
        lambda m: m["nodes"][0]["outputs"][0].update(name="router_logits"),
        "node 'root': two of its inputs, or of its outputs",
    ),
    "logits": (
        lambda m: m["nodes"][0]["outputs"][-1].update(shape=[None, 3]),
        r"node 'root': its router's logits have shape \(None, 3\) for 2 children",
    ),
}


@pytest.mark.parametrize(("change", "message"), ALTERED.values(), ids=ALTERED)
def test_altered_manifest_is_refused(bundle: Path, change: Any, message: str) -> None:
    body = json.loads((bundle / "manifest.json").read_text())
    change(body)
    with pytest.raises(FormatError, match=message):
        Manifest.from_dict(body)


def test_a_manifest_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(FormatError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_manifest_knows_all_modalities() -> None:
    assert set(MODALITIES) == set(_KINDS)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read manifest\.json"):
        read_manifest(tmp_path)


def test_export_leaves_the_net_as_it_was(net: Any, images: Tensor, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    net.backbone.eval()
    modes = {name: m.training for name, m in net.named_modules()}
    try:
        export(net, images[:1], tmp_path / "b", format="torch")
        assert {name: m.training for name, m in net.named_modules()} == modes
    finally:
        net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_existing_directories_are_respected(bundle: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("keep me")
    with pytest.raises(FormatError, match="not a bundle"), atomic_directory(foreign, overwrite=True):
        pass
    assert (foreign / "letter.txt").read_text() == "keep me"
    (foreign / "manifest.json").write_text('{"name": "a web site", "icons": []}')
    with pytest.raises(FormatError, match="not a bundle"), atomic_directory(foreign, overwrite=True):
        pass
    assert (foreign / "letter.txt").read_text() == "keep me"
    with pytest.raises(FormatError, match="overwrite"), atomic_directory(bundle, overwrite=False):
        pass


def test_a_rename_that_fails_gives_the_old_bundle_back(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(target) == own_bundle and Path(source).joinpath("new").exists():
            raise OSError(28, "No space left on device")
        rename(source, target)

    before = (own_bundle / "manifest.json").read_bytes()
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"), atomic_directory(own_bundle, overwrite=True) as work:
        (work / "new").write_text("")
    assert (own_bundle / "manifest.json").read_bytes() == before
    assert [p.name for p in own_bundle.parent.iterdir()] == [own_bundle.name]


def test_a_link_to_a_directory_stays_one(own_bundle: Path) -> None:
    link = own_bundle.parent / "current"
    link.symlink_to(own_bundle)
    with atomic_directory(link, overwrite=True) as work:
        (work / "new").write_text("")
    assert link.is_symlink()
    assert [p.name for p in own_bundle.iterdir()] == ["new"]
    link.unlink()
    link.symlink_to(own_bundle.parent / "later")
    with atomic_directory(link, overwrite=False) as work:
        (work / "new").write_text("")
    assert sorted(p.name for p in own_bundle.parent.iterdir()) == ["bundle", "current", "later"]


def test_a_failed_export_leaves_nothing_and_keeps_the_old(own_bundle: Path) -> None:
    before = (own_bundle / "manifest.json").read_bytes()

    def interrupted() -> None:
        with atomic_directory(own_bundle, overwrite=True) as work:
            (work / "half").write_text("written")
            raise RuntimeError("power failed")

    with pytest.raises(RuntimeError, match="power"):
        interrupted()
    assert (own_bundle / "manifest.json").read_bytes() == before
    assert [p.name for p in own_bundle.parent.iterdir()] == [own_bundle.name]


def test_overwrite_replaces_all_of_the_old(own_bundle: Path) -> None:
    (own_bundle / "stale").write_text("")
    with atomic_directory(own_bundle, overwrite=True) as work:
        (work / "manifest.json").write_text("{}")
    assert [p.name for p in own_bundle.iterdir()] == ["manifest.json"]
    assert [p.name for p in own_bundle.parent.iterdir()] == [own_bundle.name]


def test_pack_aligns_tensors_and_pads_the_region() -> None:
    data, used, entries = pack([("a", "int8", (3,), b"abc"), ("b", "int8", (2,), b"de")])
    assert [(e.offset, e.nbytes) for e in entries] == [(0, 3), (ALIGNMENT, 2)]
    assert (len(data), used) == (PAGE, ALIGNMENT + 2)
    assert data[ALIGNMENT : ALIGNMENT + 3] == b"de\0"
    assert pack([]) == (b"", 0, ())


class _Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().max())


def test_an_export_that_cannot_be_done_names_node_and_reason(tmp_path: Path) -> None:
    parts = [nn.Flatten(), nn.Sequential(nn.Linear(12, 3), _Untraceable())]
    with pytest.raises(
        ModelError, match=r"node '0' \(leaf\) cannot be exported to torch.export: \w+Error: .+"
    ):
        export_chain(parts, torch.zeros(2, 3, 2, 2), tmp_path / "b", format="torch")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"Rewrite the operation in that module\.$"):  # no format can
        export_chain(parts, torch.zeros(2, 3, 2, 2), tmp_path / "b", format="torch")


def test_example_inputs_that_do_not_fit_name_the_node(net: Any, images: Tensor, tmp_path: Path) -> None:
    for example, message in (
        (
            torch.zeros(2, 4, 16, 16),
            r"node 'root' \(backbone\) cannot take inputs of shape \(2, 4, 16, 16\): Runt",
        ),
        (images.bfloat16(), "bfloat16, which the runner.*float"),
        (images[0].sum(), r"no samples: its shape is \(\)"),
        (images[:0], r"no samples: its shape is \(0, 3, 16, 16\)"),
        ((), "needs example inputs"),
        (images.numpy(), "must be tensors"),
    ):
        with pytest.raises(ModelError, match=message):
            export(net, example, tmp_path / "b", format="torch")
    with pytest.raises(ModelError, match=r"node '0' \(leaf\) cannot take inputs of shape \(2, 12\)"):
        export_chain([nn.Flatten(), nn.Linear(11, 3)], torch.zeros(2, 3, 2, 2), tmp_path / "b")


class _Returns(nn.Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([_Returns(lambda x: {"logits": x})], r"node 'root' \(leaf\) returns a dict"),
        ([_Returns(lambda x: (x, None)), nn.Linear(4, 2)], r"node 'root' \(backbone\) returns a NoneType"),
        ([nn.Identity(), _Returns(lambda x: (x, x))], r"node '0' \(leaf\) returns 2 tensors.*logits alone"),
    ],
)
def test_what_a_node_returns(parts: list[nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        export_chain(parts, torch.zeros(2, 4), tmp_path / "b", format="torch")


def test_a_router_has_a_logit_per_branch(net: Any, images: Tensor, tmp_path: Path) -> None:
    wide = copy.deepcopy(net)
    wide.routers["root"].router = nn.Linear(8, 3)
    with pytest.raises(ModelError, match=r"node 'root' .*router returns \(2, 3\) for 2 branches"):
        export(wide, images[:2], tmp_path / "b", format="torch")


def test_bfloat16_behind_other_inputs_is_refused(tmp_path: Path) -> None:
    embedding = nn.Embedding(5, 4)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ModelError, match=r"node 'root' .*: body\.weight is bfloat16.*\.float\(\)"):
        export_chain([copy.deepcopy(embedding).bfloat16(), nn.Linear(4, 2)], ids, tmp_path / "b")
    with pytest.raises(ModelError, match=r"node 'root' .*: frontier_out is bfloat16"):
        export_chain([nn.Sequential(embedding, _Returns(Tensor.bfloat16)), nn.Flatten()], ids, tmp_path / "b")


def test_an_export_sees_inputs_as_the_runner_gives_them(tmp_path: Path) -> None:
    """Another order in memory would let an export pass that no call can run."""
    rows = _Returns(lambda x: x.permute(0, 2, 3, 1).view(x.shape[0], -1))
    example = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert rows(example).shape == (2, 48)
    with pytest.raises(ModelError, match=r"node 'root' .*view size is not compatible"):
        export_chain([rows], example, tmp_path / "b", format="torch")


def test_a_callers_array_is_left_as_it_was(tmp_path: Path) -> None:
    first = _Returns(lambda x: torch.relu_(x.view(-1, 4)))
    export_chain([first, nn.Linear(4, 2)], torch.zeros(2, 4), tmp_path / "b", format="torch")
    x = -np.ones((3, 4), np.float32)
    with Runner(tmp_path / "b") as runner:
        runner(x)
    assert (x == -1).all()


def test_a_network_that_is_no_tree_is_told_what_to_call(images: Tensor, tmp_path: Path) -> None:
    for write in (export, export_single_file):
        with pytest.raises(ModelError, match=r"Conv2d is not a SigmaB net.*export_chain.*SigmaBPruner"):
            write(nn.Conv2d(3, 4, 3), images[:2], tmp_path / "b.onnx")


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("onnx", "net.weights"),
        ("onnx", "net.xml"),
        ("onnx", "net"),
        ("openvino", "c3"),
        ("openvino", "c3.onnx"),
    ],
)
def test_a_single_files_name_is_checked_before_any_work(form: str, name: str, tmp_path: Path) -> None:
    suffix = {"onnx": ".onnx", "openvino": ".xml"}[form]
    message = f"format='{form}' writes a file {Path(name).stem}{suffix}; got"
    with pytest.raises(ConfigError, match=message):
        export_single_file(None, None, tmp_path / "nodir" / name, format=form)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format must be one of"),
        ({"format": "torch", "layout": "native"}, "native"),
        ({"format": "torch", "precision": "int8-weights"}, "ONNX|onnx"),
        ({"precision": "int8"}, "calibration_data"),
        ({"precision": "int3"}, "precision must be one of"),
        ({"calibration_data": []}, "calibration_data is for precision='int8'"),
        ({"precision": "fp16", "codebook": "file"}, "codebook is for precision='legonet'"),
        ({"precision": "legonet", "codebook": "file"}, "must be a PackedModel.*read_packed.*; got str"),
    ],
)
def test_options_that_do_not_fit(
    net: Any, images: Tensor, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(net, images[:2], tmp_path / "b", **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(("form", "precision"), [("onnx", "int8-weights"), ("torch", "fp16")])
def test_precisions_start_from_float32(dtype: torch.dtype, form: str, precision: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 4).to(dtype)
    with pytest.raises(ModelError, match=rf"body\.weight is {str(dtype)[6:]}, .*{precision}.*\.float\(\)"):
        export_chain(
            [model], torch.zeros(2, 4, dtype=dtype), tmp_path / "b", format=form, precision=precision
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(4, 3, 16, 16), "list of batches; got one array"),
        (
            [(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.long))],
            r"is float32 \(batch, 3, 16, 16\), int64 \(batch\); .* without targets",
        ),
        ([np.zeros((4, 3, 16, 16))], r"is float64 .*; the network takes float32 \(batch, 3, 16, 16\)"),
    ],
    ids=["bare", "targets", "type"],
)
def test_calibration_data_are_batches_of_inputs(
    net: Any, images: Tensor, tmp_path: Path, data: Any, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        export(net, images[:2], tmp_path / "b", precision="int8", calibration_data=data)


def test_calibration_data_may_be_arrays(net: Any, images: Tensor) -> None:
    with evaluating(net):
        sources = cut(net, images[:2])
        found = collect(sources, [images.numpy()], "images")
    assert [len(batches[0][0]) for batches in found.values()] == [32, 16, 8, 8, 16, 8, 8]
