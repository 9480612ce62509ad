"""Cuts, auxiliary head, and the depth-pruned network: structure, exact sizes, bad input."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.errors import ConfigError, FormatError, ModelError
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.models.mobilenet_v1 import MobileNetV1
from sigmab_plugin.models.resnet import cifar_resnet18
from sigmab_plugin.techniques.depth_pruning import (
    AuxiliaryHead,
    depth_prune,
    enumerate_cuts,
    load_depth_pruned,
    normalisation_macs,
    save_depth_pruned,
)
from sigmab_plugin.techniques.depth_pruning.cuts import kept_part, trace
from sigmab_plugin.techniques.depth_pruning.sweep import statistics_count


class Twice(nn.Module):
    """One block called twice, one activation called everywhere, functional calls between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(image))
        x = self.relu(self.block(x))
        x = self.block(x) * 2
        x = nn.functional.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


class InputAgain(nn.Module):
    """The input is read again beside ``first``: no single frontier until the two are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.cat([self.first(image), image], 1))
        return self.fc(x.mean((2, 3)))


class ControlFlow(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image if image.sum() > 0 else -image


CASES = {
    "ds_cnn": (DSCNN, (2, 1, 49, 10)),
    "mobilenet_v1": (MobileNetV1, (2, 3, 96, 96)),
    "resnet18": (cifar_resnet18, (2, 3, 32, 32)),
    "twice": (Twice, (2, 3, 8, 8)),
    "input_again": (InputAgain, (2, 3, 8, 8)),
}


def dense(case: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = CASES[case]
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(shape)


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


# Cuts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_cut_keeps_the_dense_values(case: str) -> None:
    """The kept part gives, bit for bit, what the dense model computes at that place."""
    model, inputs = dense(case)
    traced = trace(model, inputs)
    assert traced.cuts
    seen: dict[int, torch.Tensor] = {}
    value: dict[object, torch.Tensor] = {}
    interpreter = torch.fx.Interpreter(traced.graph)
    original = interpreter.run_node
    interpreter.run_node = lambda node: value.setdefault(node, original(node))  # type: ignore[method-assign]
    with torch.no_grad():
        interpreter.run(inputs)
        for index, node in enumerate(value):
            seen[index] = value[node]
        for cut in traced.cuts:
            kept = kept_part(model, traced, cut)
            out = kept(inputs)
            assert out.shape == cut.shape
            assert torch.equal(out, seen[cut.position]), cut


@pytest.mark.parametrize("case", CASES)
def test_every_cut_becomes_a_network_that_trains(case: str) -> None:
    model, inputs = dense(case)
    classes = model(inputs).shape[1]
    for cut in enumerate_cuts(model, inputs, granularity="layer")[::4]:
        net = depth_prune(model, inputs, cut=cut.name, freeze=False)
        assert net(inputs).shape == (2, classes)
        if min(cut.shape[2:]) > 1:
            net.train()(inputs).sum().backward()
            assert all(parameter.grad is not None for parameter in net.parameters())


def test_block_cuts_of_a_sequential_network() -> None:
    model, inputs = dense("ds_cnn")
    assert [cut.name for cut in enumerate_cuts(model, inputs)] == [
        "stem",
        "block1",
        "block2",
        "block3",
        "block4",
    ]


def test_layer_cuts_keep_a_convolution_with_its_normalisation_and_activation() -> None:
    model, inputs = dense("ds_cnn")
    names = [cut.name for cut in enumerate_cuts(model, inputs, granularity="layer")]
    assert names[:4] == ["stem", "block1.dw_relu", "block1", "block2.dw_relu"]
    assert names[-1] == "pool"


def test_residual_network_is_cut_only_at_block_boundaries() -> None:
    model, inputs = dense("resnet18")
    cuts = enumerate_cuts(model, inputs, granularity="layer")
    assert [cut.name for cut in cuts if cut.name.startswith("layer")] == [
        *("layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0", "layer4"),
    ]


def test_a_value_that_crosses_forbids_the_cut() -> None:
    model, inputs = dense("input_again")
    assert [cut.name for cut in enumerate_cuts(model, inputs, granularity="layer")] == ["cat", "second"]


def test_a_block_called_twice_ends_at_its_last_call() -> None:
    model, inputs = dense("twice")
    names = [cut.name for cut in enumerate_cuts(model, inputs, granularity="layer")]
    assert names.count("block") == 1
    net = depth_prune(model, inputs, cut="block")
    with torch.no_grad():
        x = model.relu(model.stem(inputs))
        expected = model.block(model.relu(model.block(x)))
        assert torch.equal(net.kept()(inputs), expected)


class RandomGraph(nn.Module):
    """Sums of earlier maps, in random order; some values are never used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = random.Random(seed)
        self.sources = [generator.sample(range(i), min(i, generator.choice((1, 1, 2)))) for i in range(1, 9)]
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in self.sources)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = [image]
        for conv, sources in zip(self.convs, self.sources, strict=True):
            maps.append(conv(maps[sources[0]] if len(sources) == 1 else maps[sources[0]] + maps[sources[1]]))
        return maps[-1].mean((2, 3))


@pytest.mark.parametrize("seed", range(25))
def test_cuts_are_exactly_the_single_frontiers(seed: int) -> None:
    """Against the definition: without that node no path leads from the input to the output."""
    model, inputs = RandomGraph(seed), torch.randn(1, 2, 3, 3)
    traced = trace(model, inputs)
    nodes = list(traced.graph.graph.nodes)
    start, end = nodes[0], nodes[-1]

    def reaches(target: torch.fx.Node, without: torch.fx.Node) -> bool:
        seen, open_nodes = {without}, [start]
        while open_nodes:
            node = open_nodes.pop()
            if node not in seen:
                seen.add(node)
                open_nodes.extend(node.users)
        return target in seen

    maps = [
        node
        for node in nodes
        if node is not start and len(getattr(node.meta.get("tensor_meta"), "shape", ())) == 4
    ]
    expected = [index for index, node in enumerate(nodes) if node in maps and not reaches(end, node)]
    assert [cut.position for cut in traced.cuts] == expected
    for cut in traced.cuts:
        assert kept_part(model, traced, cut)(inputs).shape == cut.shape


def test_an_inner_name_means_the_same_cut() -> None:
    model, inputs = dense("ds_cnn")
    assert depth_prune(model, inputs, cut="block2.pw_relu").cut == "block2"


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


# Bad input -----------------------------------------------------------------------------------------


def test_unknown_cut_lists_the_known_ones() -> None:
    model, inputs = dense("ds_cnn")
    with pytest.raises(ConfigError, match=r"'block9'.*stem, block1\.dw_relu, block1"):
        depth_prune(model, inputs, cut="block9")


def test_unknown_granularity() -> None:
    model, inputs = dense("ds_cnn")
    with pytest.raises(ConfigError, match="granularity"):
        enumerate_cuts(model, inputs, granularity="channel")


def test_untraceable_model_names_itself() -> None:
    with pytest.raises(ModelError, match=r"ControlFlow.*control flow"):
        enumerate_cuts(ControlFlow(), torch.ones(1, 3, 8, 8))


def test_a_network_of_vectors_has_no_place_for_the_head() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ModelError, match="2-D maps only"):
        enumerate_cuts(model, torch.randn(2, 4))


@pytest.mark.parametrize("sizes", [{"in_channels": 0}, {"num_classes": 0}, {"widths": (4, 0)}])
def test_head_sizes_must_be_positive(sizes: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="positive"):
        AuxiliaryHead(**{"in_channels": 4, "num_classes": 2, **sizes})  # type: ignore[arg-type]


# Files ---------------------------------------------------------------------------------------------


def test_save_and_load_are_bitwise(tmp_path: Path) -> None:
    model, inputs = dense("resnet18")
    net = depth_prune(model, inputs, cut="layer2", head_widths=(24, 8))
    save_depth_pruned(net, tmp_path / "net.safetensors")
    again = load_depth_pruned(tmp_path / "net.safetensors", cifar_resnet18(), inputs)
    with torch.no_grad():
        assert torch.equal(net(inputs), again(inputs))


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model, inputs = dense("ds_cnn")
    path = tmp_path / "net.safetensors"
    save_depth_pruned(depth_prune(model, inputs, cut="block1"), path)
    with pytest.raises(FormatError, match="does not fit"):
        load_depth_pruned(path, DSCNN(width=32), inputs)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FormatError, match="not a readable"):
        load_depth_pruned(path, model, inputs)
    save_file({"a": torch.zeros(1)}, str(path), {"format": "sigmab_plugin.depth_pruning", "version": "2"})
    with pytest.raises(FormatError, match="version '2'"):
        load_depth_pruned(path, model, inputs)
