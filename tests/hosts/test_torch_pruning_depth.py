"""Depth pruning with Torch-Pruning's calling convention, and Torch-Pruning on what it returns."""

from __future__ import annotations

import logging

import pytest
import torch
import torch_pruning as tp

from sigmab_plugin.errors import CalibrationError, ConfigError
from sigmab_plugin.hosts.torch_pruning_depth import DepthPruner
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.depth_pruning import DepthPrunedNet, DepthPruningConfig

CLIPS = torch.linspace(-1, 1, 32 * 16 * 6).reshape(32, 1, 16, 6)
TARGETS = torch.arange(32) % 3


def dense() -> DSCNN:
    return DSCNN(3, width=16, blocks=3, input_size=(16, 6)).eval()


def test_step_returns_the_new_network(caplog: pytest.LogCaptureFixture) -> None:
    model = dense()
    with caplog.at_level(logging.WARNING):
        pruner = DepthPruner(
            model,
            CLIPS[:1],
            tp.importance.MagnitudeImportance(),
            cut="block1",
            train_data=[(CLIPS, TARGETS)],
            epochs=(1,),
            learning_rates=(0.01,),
        )
    assert "importance is not used" in caplog.text
    assert [cut.name for cut in pruner.cuts()] == ["stem", "block1", "block2", "block3"]
    net = pruner.step()
    assert isinstance(net, DepthPrunedNet)
    assert net.cut == "block1"
    assert net(CLIPS).shape == (32, 3)
    assert hasattr(model, "block3")


def test_keywords_win_over_the_config() -> None:
    config = DepthPruningConfig(cut="block2", head_widths=(8,))
    net = DepthPruner(dense(), CLIPS[:1], config=config, cut="stem").step()
    assert net.cut == "stem"
    assert net.head.widths == (8,)


def test_torch_pruning_goes_on_from_there() -> None:
    net = DepthPruner(dense(), CLIPS[:1], cut="block2", freeze=False).step()
    pruner = tp.pruner.MagnitudePruner(
        net,
        (CLIPS[:1],),
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[net.head.fc],
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    assert net.block1.dw_conv.out_channels == 8
    assert net(CLIPS).shape == (32, 3)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ConfigError, match="options are the fields"):
        DepthPruner(dense(), CLIPS[:1], pruning_ratio=0.5)
    with pytest.raises(ConfigError, match="no cut after 'block9'"):
        DepthPruner(dense(), CLIPS[:1], cut="block9").step()
    with pytest.raises(CalibrationError, match="train_data and validate"):
        DepthPruner(dense(), CLIPS[:1]).step()
