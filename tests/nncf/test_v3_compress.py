"""NNCF's functions: one call carries the file out, section by section, part by part."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBNet


@pytest.fixture
def host(nncf_functions: Any) -> Any:
    from sigmab_plugin.hosts import nncf_v3

    return nncf_v3


@pytest.fixture
def dataset(nncf_functions: Any, loader: Any) -> Any:
    return nncf_functions.Dataset(loader, lambda batch: batch[0])


def with_prune(nncf: Any) -> None:
    if not hasattr(nncf, "prune"):
        pytest.skip("this NNCF has no nncf.prune")


@pytest.fixture
def tree(host: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any) -> SigmaBNet:
    net = host.compress(dense, config_of(sections["sigmab"]), dataset)
    assert isinstance(net, SigmaBNet)
    return net


def test_sigmab_alone(host: Any, tree: SigmaBNet, data: Any) -> None:
    assert not tree.training
    assert len(tree.route(data[0]).unique()) > 1


def test_repair_in_a_section(
    host: Any, tree: SigmaBNet, dense: nn.Module, config_of: Any, sections: Any, dataset: Any, data: Any
) -> None:
    repaired = host.compress(dense, config_of({**sections["sigmab"], "repair": "least_squares"}), dataset)
    with torch.no_grad():
        wanted = dense(data[0])
        away, near = (float((net(data[0]) - wanted).square().mean()) for net in (tree, repaired))
    assert near < 0.2 * away


@pytest.mark.slow
def test_sigmab_then_quantization(
    host: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any, data: Any, tmp_path: Path
) -> None:
    before = copy.deepcopy(dense)
    path = tmp_path / "nncf.json"
    path.write_text(json.dumps(config_of(sections["sigmab"], sections["quantization"])))
    reports: list[Any] = []
    trained: list[str] = []
    net = host.compress(
        dense, path, dataset, on_section=reports.append, fine_tune=lambda network, name: trained.append(name)
    )
    images, _ = data
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert [type(m) for m in dense.modules()] == [type(m) for m in before.modules()]
    assert trained == ["sigmab", "quantization"]
    assert [r.section for r in reports] == ["compression[0] (sigmab)", "compression[1] (quantization)"]
    assert reports[0].facts["active"] == net.parameter_counts().active or reports[0].facts["active"] > 0
    samples = reports[1].facts["samples"]
    assert len(samples) == 1 + 3 + 6 + 4
    routed = net.route(images).bincount(minlength=4).tolist()
    assert [samples[f"heads.{leaf.replace('/', '_')}"] for leaf in net.leaves] == routed
    assert samples["specializers.0"] + samples["specializers.1"] == 64
    # hooks act in every use of a part, not only in a call of the whole net
    plain = host.compress(dense, config_of(sections["sigmab"]), dataset)
    assert not torch.equal(net.forward_leaves(images)[0], plain.forward_leaves(images)[0])
    torch.testing.assert_close(
        net.forward_leaves(images)[0], plain.forward_leaves(images)[0], rtol=0.2, atol=0.5
    )
    agreement = (net(images).argmax(1) == plain(images).argmax(1)).float().mean()
    assert agreement > 0.9


@pytest.mark.slow
def test_get_config_restores_bit_for_bit(
    host: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any, data: Any, tmp_path: Path
) -> None:
    from sigmab_plugin.tree.io import assemble

    net = host.compress(dense, config_of(sections["sigmab"], sections["quantization"]), dataset)
    expected = net(data[0])
    config = json.loads(json.dumps(host.get_config(net)))
    restored = host.load_from_config(
        assemble(net.plan, copy.deepcopy(dense)), config, net.state_dict()
    ).eval()
    assert torch.equal(restored(data[0]), expected)
    assert restored.state_dict().keys() == net.state_dict().keys()
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])
    host.save(net, tmp_path / "saved")
    assert torch.equal(host.load(tmp_path / "saved", copy.deepcopy(dense))(data[0]), expected)


@pytest.mark.slow
def test_quantization_aware_training_then_strip(
    host: Any, nncf_functions: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any, data: Any
) -> None:
    images, targets = data
    net = host.compress(dense, config_of(sections["sigmab"], sections["quantization"]), dataset)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = net.loss(images, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    quantizers = [p for n, p in net.named_parameters() if "nncf_hooks" in n]
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in quantizers)
    net.eval()
    stripped = host.strip(net, images[:2])
    assert (stripped(images).argmax(1) == net(images).argmax(1)).float().mean() > 0.9
    kinds = {type(m).__name__ for m in stripped.modules()}
    assert "FakeQuantize" in kinds
    assert not {"SymmetricQuantizer", "AsymmetricQuantizer"} & kinds


@pytest.mark.slow
def test_weight_compression(host: Any, tree: SigmaBNet, config_of: Any, dataset: Any, data: Any) -> None:
    before = {name: tensor.clone() for name, tensor in tree.state_dict().items()}
    reports: list[Any] = []
    config = config_of({"algorithm": "weight_compression", "mode": "int8_asym"})
    net = host.compress(tree, config, dataset, on_section=reports.append)
    assert reports[0].facts["bytes_after"] < 0.5 * reports[0].facts["bytes_before"]
    assert all(torch.equal(tree.state_dict()[name], tensor) for name, tensor in before.items())
    # every leaf's logits: in hard routing a sample at a router's border may take the other branch
    torch.testing.assert_close(
        net.forward_leaves(data[0])[0], tree.forward_leaves(data[0])[0], rtol=0.1, atol=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["abs", "normed_abs"])
def test_magnitude_sparsity_after_and_before_sigmab(
    host: Any,
    nncf_functions: Any,
    dense: nn.Module,
    tree: SigmaBNet,
    config_of: Any,
    sections: Any,
    dataset: Any,
    importance: str,
) -> None:
    with_prune(nncf_functions)
    section = {
        "algorithm": "magnitude_sparsity",
        "params": {"sparsity_target": 0.6, "weight_importance": importance},
    }
    net = host.compress(tree, config_of(section), dataset)
    stripped = nncf_functions.strip(net.specializers["0"], strip_format=nncf_functions.StripFormat.IN_PLACE)
    zeros = (
        torch.cat([m.weight.flatten() for m in stripped.modules() if isinstance(m, nn.Conv2d)])
        .eq(0)
        .float()
        .mean()
    )
    assert 0.4 < float(zeros) < 0.8
    if importance == "normed_abs":
        assert float(zeros) == pytest.approx(0.6, abs=0.02)
    assert "nncf_hooks" not in "".join(name for name, _ in net.routers.named_modules())
    first = host.compress(dense, config_of(section, sections["sigmab"]), dataset)
    weights = torch.cat([m.weight.flatten() for m in first.modules() if isinstance(m, nn.Conv2d)])
    assert float(weights.eq(0).float().mean()) > 0.4


@pytest.mark.slow
def test_filter_pruning_by_torch_pruning_before_sigmab(
    host: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any, data: Any
) -> None:
    reports: list[Any] = []
    config = config_of(sections["pruning"], sections["sigmab"], sections["quantization"])
    net = host.compress(dense, config, dataset, on_section=reports.append)
    assert "Torch-Pruning removed 40 %" in str(reports[0])
    assert reports[0].facts["after"] < 0.6 * reports[0].facts["before"]
    assert net(data[0]).shape == (64, 4)
    assert len(net.route(data[0]).unique()) > 1


@pytest.mark.slow
def test_ignored_scopes_in_either_notation(
    host: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any
) -> None:
    found = []
    for scope in (
        "ResNet/Sequential[layer4]/BasicBlock[0]/NNCFConv2d[conv2]/conv2d_0",
        "layer4/0/conv2/conv2d/0",
        "{re}layer4/0/conv2",
        "{re}ResNet/Sequential\\[layer4\\]/BasicBlock\\[0\\]/NNCFConv2d\\[conv2\\]",
    ):
        section = {**sections["quantization"], "ignored_scopes": [scope], "subset_size": 16}
        net = host.compress(dense, config_of(sections["sigmab"], section), dataset)
        names = [name for name, _ in net.specializers["0_0"].named_modules() if "nncf_hooks" in name]
        assert any("/conv1/" in name for name in names)
        found.append([name for name in names if "/conv2/" in name])
    assert found == [[], [], [], []], found


@pytest.mark.slow
def test_dense_network_without_sigmab(
    host: Any, dense: nn.Module, config_of: Any, sections: Any, dataset: Any, data: Any
) -> None:
    net = host.compress(dense, config_of({**sections["quantization"], "preset": "mixed"}), dataset)
    assert not hasattr(dense, "__nncf_hooks")
    torch.testing.assert_close(net(data[0]), dense(data[0]), rtol=0.3, atol=0.5)
    restored = host.load_from_config(copy.deepcopy(dense), host.get_config(net), net.state_dict()).eval()
    assert torch.equal(restored(data[0]), net(data[0]))
