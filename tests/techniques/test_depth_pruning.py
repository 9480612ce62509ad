"""The auxiliary head and the depth-pruned network: structure, exact sizes, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.errors import ModelError
from sigmab_plugin.techniques.depth_pruning import (
    AuxiliaryHead,
    depth_prune,
    enumerate_cuts,
    normalisation_macs,
)
from sigmab_plugin.techniques.depth_pruning.sweep import statistics_count

from .depth_pruning_models import dense

# Published figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "size", "parameters"), [(64, 12, 4_178), (128, 6, 7_122), (256, 3, 13_010)]
)
def test_auxiliary_head_has_the_published_size(channels: int, size: int, parameters: int) -> None:
    """The published counts are Keras's: running statistics included."""
    head = AuxiliaryHead(channels, 2)
    assert parameter_count(head) + statistics_count(head) == parameters
    assert head(torch.randn(3, channels, size, size)).shape == (3, 2)


@pytest.mark.parametrize(
    ("case", "cut", "kept", "operations", "published"),
    [
        ("mobilenet_v1", "block5", 15_410, 3_594_272, (-0.93, -0.51)),
        ("ds_cnn", "block2", 17_852, 1_916_192, (-0.28, -0.28)),
    ],
)
def test_published_reductions(
    case: str, cut: str, kept: int, operations: int, published: tuple[float, float]
) -> None:
    """With running statistics as parameters and one MAC per normalised value, as the paper counts."""
    model, inputs = dense(case)
    pruned = depth_prune(model, inputs, cut=cut)
    assert parameter_count(pruned) + statistics_count(pruned) == kept
    assert macs(pruned, inputs[:1]) == operations

    def counted(net: nn.Module) -> tuple[int, int]:
        return (
            parameter_count(net) + statistics_count(net),
            macs(net, inputs[:1]) + normalisation_macs(net, inputs[:1]),
        )

    changes = [after / before - 1 for after, before in zip(counted(pruned), counted(model), strict=True)]
    assert tuple(round(change, 2) for change in changes) == published


# The network ---------------------------------------------------------------------------------------


def test_the_dense_model_is_left_as_it_was() -> None:
    model, inputs = dense("resnet18")
    model.train()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    net = depth_prune(model, inputs, cut="layer2")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not model.fc.weight.requires_grad
    assert model.conv1.weight.requires_grad


def test_kept_layers_keep_the_dense_names() -> None:
    model, inputs = dense("ds_cnn")
    net = depth_prune(model, inputs, cut="block2")
    assert [name for name, _ in net.named_children()] == ["stem", "block1", "block2", "auxiliary_head"]
    assert type(net.block1) is type(model.block1)
    state = model.state_dict()
    for name, tensor in net.state_dict().items():
        assert name.startswith("auxiliary_head.") or torch.equal(tensor, state[name])


def test_freezing_holds_weights_mode_and_statistics() -> None:
    model, inputs = dense("ds_cnn")
    net = depth_prune(model, inputs, cut="block1", freeze=True)
    net.train()
    assert net.training
    assert net.auxiliary_head.training
    assert not net.block1.training
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == {"auxiliary_head"}
    statistics = net.block1.dw_bn.running_mean.clone()
    net(inputs)
    assert torch.equal(net.block1.dw_bn.running_mean, statistics)
    net.freeze(False)
    assert net.block1.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    net(inputs)
    assert not torch.equal(net.block1.dw_bn.running_mean, statistics)


def test_a_copy_is_still_frozen() -> None:
    model, inputs = dense("ds_cnn")
    net = copy.deepcopy(depth_prune(model, inputs, cut="block1", freeze=True)).train()
    assert net.frozen
    assert net.cut == "block1"
    assert not net.block1.training


def test_the_seed_decides_the_head_and_the_global_generator_is_left_alone() -> None:
    model, inputs = dense("ds_cnn")
    state = torch.get_rng_state()
    nets = [depth_prune(model, inputs, cut="block1", seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (net.head.fc.weight for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_head_widths_and_classes_are_options() -> None:
    model, inputs = dense("ds_cnn")
    net = depth_prune(model, inputs, cut="block1", head_widths=(24,), num_classes=3)
    assert net(inputs).shape == (2, 3)
    assert net.head.fc.in_features == 24


def test_without_stages_the_head_is_pooling_and_a_classifier() -> None:
    model, inputs = dense("ds_cnn")
    net = depth_prune(model, inputs, cut="block1", head_widths=())
    assert parameter_count(net.head) == 12 * 64 + 12
    feature = net.kept()(inputs)
    assert torch.allclose(net(inputs), net.head.fc(feature.mean((2, 3))), atol=1e-6)


def test_dtype_and_two_inputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 4, 3), nn.Conv2d(2, 4, 3)
            self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
            self.fc = nn.Linear(4, 2)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.fc(self.body(self.left(left) + self.right(right)).mean((2, 3)))

    inputs = (torch.randn(2, 1, 8, 8).double(), torch.randn(2, 2, 8, 8).double())
    model = TwoInputs().double()
    names = [cut.name for cut in enumerate_cuts(model, inputs, granularity="layer")]
    assert names == ["add", "body"]
    out = depth_prune(model, inputs, cut="add")(*inputs)
    assert out.dtype is torch.float64
    assert out.shape == (2, 2)


class Pooled(nn.Module):
    """A convolutional classifier: (B, 10, 1, 1), or a map of scores without the pooling."""

    def __init__(self, *, pool: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.scores = nn.Conv2d(8, 10, 1)
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.pool(self.scores(self.body(image)))
        return scores


def test_the_head_has_as_many_outputs_as_the_model_has_classes() -> None:
    inputs = torch.randn(2, 3, 8, 8)
    assert depth_prune(Pooled(pool=True), inputs, cut="body")(inputs).shape == (2, 10)
    with pytest.raises(ModelError, match=r"\(2, 10, 8, 8\), not logits .*give num_classes"):
        depth_prune(Pooled(pool=False), inputs, cut="body")
    assert depth_prune(Pooled(pool=False), inputs, cut="body", num_classes=7)(inputs).shape == (2, 7)


def test_integer_parameters_stay_as_they_are() -> None:
    model = nn.Sequential(Pooled(pool=True))
    model.double()
    model[0].body.register_parameter("codes", nn.Parameter(torch.arange(3), requires_grad=False))
    inputs = torch.randn(2, 3, 8, 8).double()
    net = depth_prune(model, inputs, cut="0.body")
    assert net(inputs).dtype is torch.float64
    net.freeze(False)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"0.body.codes"}


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"in_channels": 0}, {"num_classes": 0}, {"widths": (4, 0)}])
def test_head_sizes_must_be_positive(sizes: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="positive"):
        AuxiliaryHead(**{"in_channels": 4, "num_classes": 2, **sizes})  # type: ignore[arg-type]
