"""Bundles whose weights are indices into a codebook: fewer bytes read, the same network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.deploy import Runner, export, export_chain, read_manifest
from sigmab_plugin.deploy.codebooks import _expand_into, _unpack
from sigmab_plugin.errors import ConfigError, FormatError, ModelError
from sigmab_plugin.techniques.legonet import LegoNetConfig, PackedModel, expand_into, pack, pack_bits
from sigmab_plugin.techniques.legonet.blocks import from_blocks, to_blocks

Packed = tuple[Any, PackedModel, Path]


def _read_by_the_process() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


@pytest.fixture(scope="module", params=["none", "layer", "row"])
def packed(
    request: pytest.FixtureRequest, net: Any, images: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Packed:
    codes = pack(net, LegoNetConfig(codebook_size=24, scale=request.param, iterations=2))
    expanded: Any = expand_into(codes, net)
    expanded.balance(images)
    directory = tmp_path_factory.mktemp("codes") / "torch"
    # Balancing moved router biases only: they are stored dense, as they are now.
    export(expanded, images[:2], directory, format="torch", precision="legonet", codebook=codes)
    return expanded, codes, directory


@pytest.mark.parametrize("prefetch", ["none", "both"])
def test_expanded_lazily_and_right(packed: Packed, images: Tensor, prefetch: str) -> None:
    net, _, directory = packed
    logits, leaves = net.reference(images)
    with Runner(directory, prefetch=prefetch) as runner:
        first = runner(images[:1])
        assert len(runner.resident()) == 3 or prefetch == "both"  # one path of seven nodes
        result = runner.run(images)
    np.testing.assert_allclose(first, logits[:1].numpy(), atol=1e-5)
    np.testing.assert_allclose(result.logits, logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(result.leaves, leaves.numpy())


def test_weights_are_those_of_the_packed_model_bit_for_bit(packed: Packed, images: Tensor) -> None:
    net, _, directory = packed
    with Runner(directory) as runner:
        seen: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        bind = runner._backend.bind

        def spy(node: Any, program: Any, buffer: Any) -> Any:
            bound: Any = bind(node, program, buffer)
            names = [entry.name for entry in node.weights.tensors]
            seen[node.path] = {n: w.numpy() for n, w in zip(names, bound._weights, strict=True)}
            return bound

        runner._backend.bind = spy  # type: ignore[method-assign]
        runner.warm()
        state = net.state_dict()
        for name, tensor in seen["0/1"].items():
            home = {"body": "specializers.0_1", "head": "heads.0_1"}[name.partition(".")[0]]
            np.testing.assert_array_equal(tensor, state[f"{home}.{name.partition('.')[2]}"].numpy())


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's I/O counters")
def test_bytes_actually_read(packed: Packed, bundle: Path, images: Tensor) -> None:
    """Counted by the runner and by the system; regions are whole pages, which small nodes fill badly."""
    _, _, directory = packed
    manifest = read_manifest(directory)
    coded = sum(n.weights.used for n in manifest.nodes)
    plain = sum(n.weights.used for n in read_manifest(bundle).nodes)
    assert coded < plain / 3
    with Runner(directory, retain=False, io="direct") as runner:
        try:
            runner(images[:1])
        except FormatError as error:
            pytest.skip(f"this file system has no direct reads: {error}")
        runner.reset_statistics()
        before = _read_by_the_process()
        for image in images[:4]:
            runner(image[None])
        counted = _read_by_the_process() - before
        stats = runner.statistics()
    assert counted == stats.bytes_read == 4 * max(manifest.path_bytes().values())
    expanded = max(sum(n.memory_bytes for n in manifest.path_nodes(leaf)) for leaf in manifest.leaves)
    assert stats.peak_resident_bytes <= expanded


def test_budgets_count_what_codes_expand_to(packed: Packed, images: Tensor) -> None:
    _, _, directory = packed
    manifest = read_manifest(directory)
    needed = max(sum(n.memory_bytes for n in manifest.path_nodes(leaf)) for leaf in manifest.leaves)
    assert needed > 2 * max(manifest.path_bytes().values())
    with pytest.raises(ConfigError, match=f"at least {needed} bytes"):
        Runner(directory, budget_bytes=needed - 1)
    with Runner(directory, budget_bytes=needed, prefetch="both") as runner:
        for image in images:
            runner(image[None])
        assert runner.statistics().peak_resident_bytes <= needed


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_other_runtimes_take_folded_weights_as_scaled_rows(
    net: Any, images: Tensor, tmp_path: Path, form: str
) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(form, form))
    codes = pack(net, LegoNetConfig(codebook_size=32, iterations=2))
    expanded: Any = expand_into(codes, net)
    manifest = export(expanded, images[:2], tmp_path / "b", format=form, precision="legonet", codebook=codes)
    logits, leaves = expanded.reference(images)
    with Runner(tmp_path / "b", threads=1) as runner:
        result = runner.run(images)
    np.testing.assert_allclose(result.logits, logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(result.leaves, leaves.numpy())
    leaf = manifest.node("0/0")
    assert {"body.0.weight.index", "body.0.weight.scale"} <= {t.name for t in leaf.weights.tensors}
    assert leaf.weights.used < leaf.extra["codebook"]["nbytes"] / 2


@pytest.mark.parametrize("shape", [(8, 8), (7, 5, 3, 3), (3, 9), (64, 16, 3, 3)])
@pytest.mark.parametrize("codes", [1, 24, 256, 300])
def test_expansion_is_that_of_the_packed_tensor(shape: tuple[int, ...], codes: int) -> None:
    torch.manual_seed(0)
    codebook = torch.randn(codes, 16)
    count = len(to_blocks(torch.zeros(shape), 4))
    index = torch.randint(codes, (count,))
    bits = (codes - 1).bit_length()
    packed = pack_bits(index, bits).numpy()
    np.testing.assert_array_equal(_unpack(packed, count, bits), index.numpy())
    matrix = np.empty((shape[0], int(np.prod(shape[1:]))), np.float32)
    _expand_into(matrix, packed, codebook.numpy(), 4)
    np.testing.assert_array_equal(matrix.reshape(shape), from_blocks(codebook[index], shape, 4).numpy())


def test_codes_past_the_codebook_are_refused(packed: Packed, images: Tensor, tmp_path: Path) -> None:
    """24 entries take 5 bits: altered codes may ask for entry 31. sha256 is off, or it would say so first."""
    _, _, directory = packed
    copied = tmp_path / "b"
    copied.mkdir()
    for file in directory.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    region = read_manifest(copied).node("").weights
    entry = next(t for t in region.tensors if t.name == "body.0.weight.index")
    data = bytearray((copied / region.file).read_bytes())
    data[entry.offset : entry.offset + entry.nbytes] = b"\xff" * entry.nbytes
    (copied / region.file).write_bytes(data)
    with (
        Runner(copied, verify="off") as runner,
        pytest.raises(FormatError, match="node 'root': its codes do not fit its codebook"),
    ):
        runner(images[:1])


def test_an_altered_description_is_refused(packed: Packed, tmp_path: Path) -> None:
    _, _, directory = packed
    body = json.loads((directory / "manifest.json").read_text())
    del body["nodes"][0]["extra"]["codebook"]["tensors"]
    (tmp_path / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(FormatError, match="node 'root': its codebook's description is altered"):
        Runner(tmp_path)


def test_what_cannot_be_exported_says_so(net: Any, images: Tensor, tmp_path: Path) -> None:
    codes = pack(net, LegoNetConfig(codebook_size=8, iterations=1))
    options: dict[str, Any] = {"format": "torch", "precision": "legonet"}
    with pytest.raises(ModelError, match="not the one that was packed"):
        export(net, images[:2], tmp_path / "a", codebook=codes, **options)
    with pytest.raises(ConfigError, match="needs packed weights"):
        export(net, images[:2], tmp_path / "b", **options)
    with pytest.raises(ConfigError, match="layout='portable'"):
        export(net, images[:2], tmp_path / "c", codebook=codes, precision="legonet", layout="native")
    with pytest.raises(ConfigError, match="ExecuTorch"):
        export(net, images[:2], tmp_path / "d", codebook=codes, precision="legonet", format="executorch")
    with pytest.raises(ConfigError, match="SigmaB nets"):
        export_chain([nn.Linear(4, 4)], torch.zeros(2, 4), tmp_path / "e", **options)
    carried = copy.deepcopy(expand_into(codes, net))
    carried.legonet = codes  # type: ignore[assignment]
    manifest = export(carried, images[:2], tmp_path / "f", **options)
    assert manifest.precision == "legonet"
