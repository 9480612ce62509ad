"""Where a network can be cut, and that the kept part computes what the dense network does."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from sigmab_plugin.errors import ConfigError, ModelError
from sigmab_plugin.techniques.depth_pruning import depth_prune, enumerate_cuts
from sigmab_plugin.techniques.depth_pruning.cuts import kept_part, trace

from .depth_pruning_models import CASES, dense


class ControlFlow(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image if image.sum() > 0 else -image


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


def test_a_size_that_crosses_does_not_forbid_the_cut() -> None:
    model, inputs = dense("sizes")
    assert [cut.name for cut in enumerate_cuts(model, inputs)] == ["first"]
    names = [cut.name for cut in enumerate_cuts(model, inputs, granularity="layer")]
    assert names == ["first", "relu", "reshape"]
    net = depth_prune(model, inputs, cut="reshape")
    assert net(torch.randn(5, 3, 8, 8)).shape == (5, 2)


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
