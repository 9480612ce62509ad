"""Torch-Pruning's pruners as a section."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBPruner
from sigmab_plugin.counting import parameter_count
from sigmab_plugin.errors import ConfigError, ModelError
from sigmab_plugin.hosts.torch_pruning_section import TorchPruningConfig, technique
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.depth_pruning import DepthPrunedNet, depth_prune

CLIPS = torch.linspace(-1, 1, 32 * 16 * 6).reshape(32, 1, 16, 6)
CONTEXT = Context(example_inputs=CLIPS[:1])


def dense() -> DSCNN:
    return DSCNN(3, width=16, blocks=3, input_size=(16, 6)).eval()


def test_channels_go_and_the_model_stays() -> None:
    model = dense()
    model.fc.weight.requires_grad_(False)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = technique.apply(model, TorchPruningConfig(pruning_ratio=0.25), CONTEXT)
    assert pruned.block1.dw_conv.out_channels == 12
    assert pruned(CLIPS).shape == (32, 3)
    assert not pruned.fc.weight.requires_grad
    assert pruned.block1.pw_conv.weight.requires_grad
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_options_reach_torch_pruning() -> None:
    config = TorchPruningConfig(pruning_ratio=0.4, round_to=8, ignored_layers=("stem.conv",))
    pruned = technique.apply(dense(), config, CONTEXT)
    assert pruned.stem.conv.out_channels == 16
    assert pruned.block3.pw_conv.out_channels == 8
    ratios = TorchPruningConfig(pruning_ratio=0.0, pruning_ratios={"block3.pw_conv": 0.5})
    assert technique.apply(dense(), ratios, CONTEXT).block3.pw_conv.out_channels == 8


def test_a_depth_pruned_network_stays_one() -> None:
    net = technique.apply(depth_prune(dense(), CLIPS[:1], cut="block2"), TorchPruningConfig(), CONTEXT)
    assert isinstance(net, DepthPrunedNet)
    assert net(CLIPS).shape == (32, 3)
    assert not net.stem.conv.weight.requires_grad


def test_a_tree_is_traced_with_all_its_leaves() -> None:
    options = {"levels": ["block2", "block3"], "head": "pool", "projection_dim": 4}
    net = SigmaBPruner(dense(), CLIPS[:1], calibration_data=CLIPS.split(16), **options).step()
    pruned = technique.apply(net, TorchPruningConfig(pruning_ratio=0.3), CONTEXT)
    assert pruned.routing == "auto"
    assert parameter_count(pruned) < 0.8 * parameter_count(net)
    for routing in ("soft", "hard"):
        pruned.routing = routing
        assert pruned(CLIPS).shape == (32, 3)
    counts = pruned.parameter_counts()
    assert len(set(counts.per_path.values())) == 1


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="example_inputs"):
        technique.apply(dense(), TorchPruningConfig(), Context())
    with pytest.raises(ConfigError, match="no module 'block9'"):
        technique.apply(dense(), TorchPruningConfig(ignored_layers=("block9",)), CONTEXT)
    with pytest.raises(ModelError, match="nothing was pruned"):
        technique.apply(nn.Sequential(nn.Flatten(), nn.Linear(96, 3)), TorchPruningConfig(), CONTEXT)
