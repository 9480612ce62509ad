"""NNCF 2.x on trees: one that exists already, leaves that few samples reach, and what is left after an error."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sigmab_plugin
from sigmab_plugin import SigmaBNet


@pytest.fixture
def build(nncf_v2: Any, config_of: Any, loader: Any, tmp_path: Path) -> Any:
    from nncf import NNCFConfig

    def make(model: nn.Module, *sections: dict[str, Any], batches: Any = None, state: Any = None) -> Any:
        config = NNCFConfig.from_dict(config_of(*sections, log_dir=str(tmp_path)))
        if state is None:
            config = nncf_v2.register_default_init_args(config, batches or loader)
        return nncf_v2.create_compressed_model(model, config, compression_state=state, dump_graphs=False)

    return make


@pytest.fixture
def tree(dense: nn.Module, data: Any, tmp_path: Path) -> SigmaBNet:
    """A tree as :func:`sigmab_plugin.load` gives it."""
    images, _ = data
    pruner = sigmab_plugin.SigmaBPruner(
        dense, images[:1], calibration_data=[images[:32], images[32:]], levels=["layer3", "layer4"], head="fc"
    )
    sigmab_plugin.save(pruner.step(), tmp_path / "tree")
    return sigmab_plugin.load(tmp_path / "tree", dense).eval()


def masked(network: nn.Module) -> set[str]:
    return {name for name, module in network.named_modules() if len(getattr(module, "pre_ops", ())) > 0}


def test_every_branch_of_a_given_tree_is_compressed(
    build: Any, tree: SigmaBNet, sections: Any, data: Any
) -> None:
    images, _ = data
    before, kinds = copy.deepcopy(tree.state_dict()), [type(module) for module in tree.modules()]
    layers = {
        name
        for name, module in tree.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith("routers.")
    }
    with torch.no_grad():
        expected = tree(images)
    section = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.0}
    controller, network = build(tree, section)
    assert masked(network) == layers
    assert isinstance(network, SigmaBNet)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), expected)
    assert [type(module) for module in tree.modules()] == kinds
    assert tree.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tree.state_dict().items())
    _, restored = build(tree, section, state=controller.get_compression_state())
    restored.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(restored.eval()(images), network(images))


def test_scopes_in_a_given_tree(build: Any, tree: SigmaBNet, sections: Any) -> None:
    stem = "SigmaBNet/GraphModule[backbone]/NNCFConv2d[conv1]/conv2d_0"
    head = "ResNet/NNCFLinear[fc]/linear_0"
    _, every = build(tree, sections["sparsity"])
    _, fewer = build(tree, {**sections["sparsity"], "ignored_scopes": [stem, head]})
    heads = {f"heads.{leaf.replace('/', '_')}.fc" for leaf in tree.leaves}
    assert masked(every) - masked(fewer) == {"backbone.conv1", *heads}


def test_a_dense_model_after_a_tree_is_nncfs_own_matter(
    nncf_v2: Any, tree: SigmaBNet, dense: nn.Module, sections: Any, config_of: Any, tmp_path: Path
) -> None:
    from nncf import NNCFConfig

    config = NNCFConfig.from_dict(config_of(sections["sparsity"], log_dir=str(tmp_path)))
    for model, one_section in ((tree, False), (dense, True)):
        controller, _ = nncf_v2.create_compressed_model(model, config, dump_graphs=False)
        assert hasattr(controller, "child_ctrls") is not one_section


def test_a_context_that_fails_leaves_the_model_as_it_was(
    nncf_v2: Any, dense: nn.Module, sections: Any, config_of: Any, loader: Any, tmp_path: Path
) -> None:
    from nncf import NNCFConfig

    kinds, names = [type(module) for module in dense.modules()], list(dense.state_dict())
    values = config_of(sections["sigmab"], log_dir=str(tmp_path))
    values["input_info"] = [{"sample_size": [1, 3, 16, 16], "keyword": "x"}]
    config = nncf_v2.register_default_init_args(NNCFConfig.from_dict(values), loader)
    with pytest.raises(Exception, match="keyword"):
        nncf_v2.create_compressed_model(dense, config, dump_graphs=False)
    assert [type(module) for module in dense.modules()] == kinds
    assert list(dense.state_dict()) == names


class Headed(nn.Module):
    """A network whose head has a BatchNorm of one value per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc1 = nn.Linear(16, 16)
        self.bn = nn.BatchNorm1d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.stem(x))).mean((2, 3))
        logits: torch.Tensor = self.fc(torch.relu(self.bn(self.fc1(x))))
        return logits


def test_batchnorm_adaptation_takes_a_lone_sample(build: Any, sections: Any, data: Any) -> None:
    from nncf.torch.initialization import DataLoaderBNAdaptationRunner, wrap_dataloader_for_init

    from sigmab_plugin.hosts.nncf_v2_calibration import lone_samples_normalised

    torch.manual_seed(0)
    section = {**sections["sigmab"], "levels": ["layer1", "layer2"], "head": "fc1"}
    _, network = build(Headed().eval(), section)
    images, targets = data
    network.eval()
    counts = network.route(images).bincount(minlength=4)
    leaf = int(counts.argmax())
    alone = (network.route(images) == leaf).nonzero()[:1, 0]
    rest = (network.route(images) != leaf).nonzero()[:15, 0]
    rows = torch.cat([alone, rest])
    batches = wrap_dataloader_for_init(
        DataLoader(TensorDataset(images[rows], targets[rows]), batch_size=len(rows))
    )
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        DataLoaderBNAdaptationRunner(network, None).run(batches, 1)
    norm = {key: head.bn for key, head in network.heads.items()}
    before = {key: module.running_mean.clone() for key, module in norm.items()}
    with lone_samples_normalised(network):
        DataLoaderBNAdaptationRunner(network, None).run(batches, 1)
    changed = {key for key, module in norm.items() if not torch.equal(module.running_mean, before[key])}
    visited = {network.leaves[i].replace("/", "_") for i in network.route(images[rest]).tolist()}
    assert changed
    assert changed <= visited
    assert network.leaves[leaf].replace("/", "_") not in changed
    assert not any(module._forward_pre_hooks for module in norm.values())


@pytest.mark.slow
def test_leaf_without_samples_for_its_ranges(
    build: Any, dense: nn.Module, sections: Any, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    images, targets = data
    order = targets.argsort()  # one class after the other
    batches = DataLoader(TensorDataset(images[order], targets[order]), batch_size=16)
    for samples, soft in ((16, True), (64, False)):
        caplog.clear()
        section = copy.deepcopy(sections["quantization"])
        section["initializer"]["range"]["num_init_samples"] = samples
        with caplog.at_level(logging.WARNING, logger="sigmab_plugin"):
            controller, network = build(dense, sections["sigmab"], section, batches=batches)
        counts = network.eval().route(images[order][:samples]).bincount(minlength=4)
        assert (int(counts.min()) < 2) is soft
        assert ("too few reach" in caplog.text) is soft
        assert network.routing == "auto"
        quantizers = controller.child_ctrls[1].non_weight_quantizers.values()
        assert all(float(info.quantizer_module_ref.scale.min()) > 0 for info in quantizers)


@pytest.mark.slow
def test_a_given_tree_is_quantized_and_exported(
    build: Any, tree: SigmaBNet, data: Any, sections: Any, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    images, _ = data
    controller, network = build(tree, sections["quantization"])
    network.eval()
    names = [str(name) for name in controller.child_ctrls[0].weight_quantizers]
    for key in network.specializers:
        assert any(f"ModuleDict[specializers]/GraphModule[{key}]/" in name for name in names), key
    with torch.no_grad():
        expected = network(images)
    controller.export_model(str(tmp_path / "net.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    got = torch.cat([torch.from_numpy(session.run(None, {name: image[None].numpy()})[0]) for image in images])
    assert float(torch.isclose(got, expected, rtol=1e-3, atol=1e-4).all(dim=1).float().mean()) >= 0.95


def watched(network: Any) -> list[str]:
    """Layers at which one of NNCF's hooks on activations acts from now on, in order of calls."""
    from nncf.torch.graph.transformations.commands import PTInsertionCommand, PTTargetPoint, TargetType
    from nncf.torch.graph.transformations.layout import PTTransformationLayout
    from nncf.torch.model_transformer import PTModelTransformer

    class Note(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            seen.append(self.name)
            return value

    seen: list[str] = []
    layout = PTTransformationLayout()
    for node in network.nncf.get_graph().get_all_nodes():
        if node.node_name.endswith(("conv2d_0", "linear_0")) and "[routers]" not in node.node_name:
            point = PTTargetPoint(TargetType.OPERATOR_POST_HOOK, node.node_name)
            layout.register(PTInsertionCommand(point, Note(node.layer_name)))
    PTModelTransformer(network).transform(layout)
    return seen


def test_every_way_through_the_net_runs_with_nncfs_hooks(
    build: Any, dense: nn.Module, sections: Any, data: Any
) -> None:
    images, targets = data
    _, network = build(dense, sections["sigmab"])
    network.eval()
    with torch.no_grad():
        logits, index = SigmaBNet.forward_leaves(network, images)[0], SigmaBNet.route(network, images)
        got = network.forward_leaves(images)[0]
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, logits)
        assert torch.equal(network.route(images), index)
        assert torch.equal(network.forward_routed(images)[1], index)
    seen = watched(network)
    network.train()
    network(images)
    whole = sorted(seen)
    assert any("specializers" in name for name in whole)
    ways = {
        "loss": lambda: network.loss(images, targets),
        "forward_leaves": lambda: network.forward_leaves(images),
        "leaf_probabilities": lambda: network.leaf_probabilities((images,)),
    }
    for name, way in ways.items():
        seen.clear()
        way()
        assert sorted(seen) == whole, name
    seen.clear()
    network.loss(images, targets).backward()
    assert all(head.fc.weight.grad is not None for head in network.heads.values())
    network.eval()
    for name, way in {"route": network.route, "forward_routed": network.forward_routed}.items():
        seen.clear()
        with torch.no_grad():
            way(images)
        assert seen, name
        assert set(seen) <= set(whole)


def test_finetune_trains_with_nncfs_hooks(
    build: Any, dense: nn.Module, sections: Any, loader: Any, data: Any
) -> None:
    _, network = build(dense, sections["sigmab"])
    seen = watched(network)
    sigmab_plugin.finetune(network, loader, epochs=1)
    assert len(seen) > 0
