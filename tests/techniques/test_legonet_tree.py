"""SigmaB, then LegoNet; and LegoNet through Torch-Pruning's calling convention."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBNet, SigmaBPruner
from sigmab_plugin.counting import storage_bytes
from sigmab_plugin.errors import ConfigError, FormatError, ModelError
from sigmab_plugin.hosts.torch_pruning_techniques import LegoNetPruner
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.legonet import (
    LazyNodes,
    LegoNetConfig,
    expand_into,
    expand_node,
    finetune_codebook,
    load_packed,
    pack,
    save_packed,
    technique,
)

from .mix_and_match_models import SmallResNet, accuracy, batches, train

DATA = batches(4)


@pytest.fixture(scope="module")
def tree() -> SigmaBNet:
    torch.manual_seed(0)
    dense = train(SmallResNet(), DATA, 5)
    pruner = SigmaBPruner(
        dense, DATA[0][0], levels=["layer2", "layer3"], head="fc", calibration_data=DATA, projection_dim=16
    )
    return pruner.step().eval()


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_tree_is_packed_with_all_its_leaves(tree: SigmaBNet, tmp_path: Path) -> None:
    packed = pack(tree, LegoNetConfig(codebook_size=64))
    for leaf in tree.leaves:
        for name, module in tree.path_modules(leaf):
            weights = {f"{name}.{n}" for n, p in module.named_parameters() if p.ndim >= 2}
            assert weights <= packed.tensors.keys()
    path = tmp_path / "tree.safetensors"
    save_packed(packed, path)
    expanded = expand_into(packed, tree)
    loaded = load_packed(path, tree)
    assert isinstance(loaded, SigmaBNet)
    assert same(expanded, loaded)
    inputs = DATA[0][0]
    for routing in ("soft", "hard"):
        expanded.routing = loaded.routing = routing
        assert torch.equal(expanded(inputs), loaded(inputs))


def test_nodes_are_expanded_one_by_one(tree: SigmaBNet, tmp_path: Path) -> None:
    packed = pack(tree, LegoNetConfig(codebook_size=64))
    save_packed(packed, tmp_path / "tree")
    whole = expand_into(packed, tree)
    for leaf in tree.leaves:
        for name, module in tree.path_modules(leaf):
            if not module.state_dict():
                continue
            node = copy.deepcopy(module)
            node.load_state_dict(expand_node(tmp_path / "tree", name))
            assert same(node, whole.get_submodule(name))


def test_only_the_paths_that_are_taken_are_expanded(tree: SigmaBNet, tmp_path: Path) -> None:
    packed = pack(tree, LegoNetConfig(codebook_size=64))
    save_packed(packed, tmp_path / "tree")
    whole = expand_into(packed, tree).eval()
    before = copy.deepcopy(tree)
    with LazyNodes(tmp_path / "tree", tree) as lazy:
        assert same(tree, before)
        assert not lazy.resident
        one = DATA[0][0][:1]
        assert torch.equal(lazy.net(one), whole(one))
        leaf = tree.leaves[int(whole.route(one))]
        taken = {name for name, module in tree.path_modules(leaf) if module.state_dict()}
        assert set(lazy.resident) == taken
        assert sum(lazy.resident.values()) < storage_bytes(tree)
        here = tuple(f"{name}." for name in taken)
        assert all(p.is_meta != n.startswith(here) for n, p in lazy.net.named_parameters())
        lazy.release(f"heads.{leaf.replace('/', '_')}")
        assert set(lazy.resident) == taken - {f"heads.{leaf.replace('/', '_')}"}
        every = torch.cat([inputs for inputs, _ in DATA])
        assert torch.equal(lazy.net(every), whole(every))
    with pytest.raises(ModelError, match="none of the nodes"):
        LazyNodes(tmp_path / "tree", tree, nodes=["backbone"])


def test_nodes_of_another_architecture_are_refused_on_first_use(tmp_path: Path) -> None:
    save_packed(pack(SmallResNet(4), LegoNetConfig(codebook_size=16)), tmp_path / "net")
    with LazyNodes(tmp_path / "net", SmallResNet(5)) as lazy:
        lazy.acquire("layer1")
        with pytest.raises(FormatError, match=r"(?s)does not fit 'fc' of this SmallResNet.*size mismatch"):
            lazy.acquire("fc")


def test_technique_on_a_tree_with_batchnorm_and_finetuning(tree: SigmaBNet) -> None:
    before = copy.deepcopy(tree)
    config = LegoNetConfig(codebook_size=64, finetune_epochs=3, reestimate_batchnorm=True)
    result = technique.apply(tree, config, Context(train_data=DATA, calibration_data=DATA))
    plain = technique.apply(tree, LegoNetConfig(codebook_size=64), Context())
    assert same(tree, before)
    assert isinstance(result, SigmaBNet)
    assert accuracy(result, DATA) > accuracy(plain, DATA)
    assert result.legonet.codebook.shape == (64, 16)


def test_finetuning_uses_the_trees_own_loss(tree: SigmaBNet) -> None:
    packed = pack(tree, LegoNetConfig(codebook_size=16))
    tuned = finetune_codebook(packed, tree, DATA, epochs=3)
    inputs, targets = DATA[0]
    with torch.no_grad():
        first, last = (expand_into(p, tree).loss(inputs, targets) for p in (packed, tuned))
    assert last < first


def test_pruner_convention(tree: SigmaBNet) -> None:
    model = SmallResNet()
    pruner = LegoNetPruner(
        model,
        DATA[0][0],
        None,
        codebook_size=8,
        ignored_layers=[model.fc],
        calibration_data=DATA,
        scale="row",
    )
    net = pruner.step()
    assert torch.equal(net.fc.weight, model.fc.weight)
    assert not torch.equal(net.conv1.weight, model.conv1.weight)
    assert pruner.report.codebook_size == 8
    assert same(expand_into(pruner.packed, model), net)
    assert isinstance(
        LegoNetPruner(tree, DATA[0][0], config=LegoNetConfig(codebook_size=4)).step(), SigmaBNet
    )
    with pytest.raises(ConfigError, match="codebook"):
        LegoNetPruner(model, DATA[0][0], codebook=8)
    with pytest.raises(ConfigError, match="no module of this model"):
        LegoNetPruner(model, DATA[0][0], ignored_layers=[nn.Linear(1, 1)])
