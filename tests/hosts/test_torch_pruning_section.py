"""Torch-Pruning's pruners as a section."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin import SigmaBPruner
from sigmab_plugin.counting import parameter_count
from sigmab_plugin.errors import ConfigError, ModelError
from sigmab_plugin.hosts.torch_pruning_section import TorchPruningConfig, technique
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.depth_pruning import DepthPrunedNet, depth_prune
from sigmab_plugin.techniques.supervised import logits_of

from ..techniques.mix_and_match_models import SmallViT

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


IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


class ConvHead(nn.Module):
    """Two convolutions and a 1 x 1 convolution to the classes: a map of logits, or their mean."""

    def __init__(self, pooled: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.classes = nn.Conv2d(16, 10, 1)
        self.pooled = pooled
        self.offsets = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor]:
        maps = self.classes(self.second(self.first(x).relu()).relu())
        if self.pooled == "mean":
            return (maps.mean((2, 3)),)
        return nn.functional.adaptive_avg_pool2d(maps, 1) if self.pooled == "1x1" else maps


@pytest.mark.parametrize("pooled", ["mean", "1x1", "map"])
def test_a_convolutional_classifier_keeps_its_classes(pooled: str) -> None:
    model = ConvHead(pooled).eval()
    state = torch.random.get_rng_state()
    pruned = technique.apply(model, TorchPruningConfig(), Context(example_inputs=IMAGES))
    assert torch.equal(state, torch.random.get_rng_state())
    assert (pruned.second.out_channels, pruned.classes.out_channels) == (8, 10)
    assert logits_of(pruned(IMAGES)).shape == logits_of(model(IMAGES)).shape
    assert not pruned.offsets.requires_grad


def test_attention_keeps_the_width_that_its_forward_has_fixed() -> None:
    model = SmallViT(width=16).eval()
    pruned = technique.apply(model, TorchPruningConfig(), Context(example_inputs=IMAGES))
    assert pruned(IMAGES).shape == (2, 4)
    assert pruned.blocks[0].attn.qkv.out_features == 48
    assert pruned.blocks[0].mlp[0].out_features == 32
    named = TorchPruningConfig(
        pruning_ratios={"blocks.0.attn.qkv": 0.3}
    )  # asked for, and not a multiple of the heads
    with pytest.raises(ModelError, match="does not run"):
        technique.apply(model, named, Context(example_inputs=IMAGES))


class Scaled(nn.Module):
    """Classes behind a normalisation, where they are not recognised; or a width written into forward."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 10, 1)
        self.norm, self.fixed = nn.BatchNorm2d(10), fixed

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x)
        if self.fixed:
            maps = maps.view(-1, 16, 14, 14)
        return self.norm(self.last(maps)).mean((2, 3))


def test_a_pruned_network_that_lost_classes_or_does_not_run_is_refused() -> None:
    for fixed, words in ((False, r"\(2, 5\) instead of \(2, 10\)"), (True, "does not run")):
        with pytest.raises(ModelError, match=words):
            technique.apply(Scaled(fixed).eval(), TorchPruningConfig(), Context(example_inputs=IMAGES))
    kept = technique.apply(
        Scaled(False).eval(), TorchPruningConfig(ignored_layers=("last",)), Context(example_inputs=IMAGES)
    )
    assert kept(IMAGES).shape == (2, 10)


def test_an_output_without_logits_is_refused() -> None:
    class Named(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            return {"classes": super().forward(x)}

    with pytest.raises(ModelError, match="no logits"):
        technique.apply(Named(4, 3), TorchPruningConfig(), Context(example_inputs=torch.ones(2, 4)))
