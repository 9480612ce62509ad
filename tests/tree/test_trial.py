"""A group that the graph describes wrongly keeps its channels; every other one stays free."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sigmab_plugin import SigmaBConfig, SigmaBPruner
from sigmab_plugin.channels import ChannelGroup
from sigmab_plugin.channels.slicing import named_tensors
from sigmab_plugin.errors import ConfigError
from sigmab_plugin.tree.prepare import prepare
from sigmab_plugin.tree.reading import read_example
from sigmab_plugin.tree.trial import confirmed_groups

from ..zoo import CASES, Case

CONFIG = SigmaBConfig(levels=("b", "c"), head="d", projection_dim=8)


class Attention(nn.Module):
    """Written by hand, as in most vision transformers: the heads are known to a reshape alone."""

    def __init__(self, dim: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b, self.c = Block(16), Block(16)
        self.d = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))).mean(1))


class Between(nn.Module):
    """Something between two convolutions of a level."""

    def __init__(
        self, inputs: int, function: Callable[[torch.Tensor], torch.Tensor], width: int = 24
    ) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Conv2d(inputs, 24, 3, padding=1), nn.Conv2d(width, 24, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.last(self.function(torch.relu(self.first(x)))))


class ConvNet(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int = 24) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.c = Between(16, function, width)
        self.d = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def _partial(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([2 * x[:, :6], x[:, 6:]], 1)


WRONG = {
    "shuffle": (_shuffled, 24),
    "flip": (lambda x: x.flip(1), 24),
    "roll": (lambda x: x.roll(5, 1), 24),
    "halves swapped": (lambda x: torch.cat([x[:, 12:], x[:, :12]], 1), 24),
    "pad in front": (lambda x: F.pad(x, (0, 0, 0, 0, 3, 0)), 27),
    "fixed size": (lambda x: x.reshape(x.shape[0], 24, -1).reshape(x.shape), 24),
    "normalised over a fixed size": (lambda x: F.layer_norm(x.movedim(1, 3), (24,)).movedim(3, 1), 24),
    "first channels": (_partial, 24),
}
RIGHT = {
    "nothing": (lambda x: x, 24),
    "normalised over channels": (lambda x: x / (x.pow(2).mean(1, keepdim=True) + 1).sqrt(), 24),
    "softmax over channels": (lambda x: x.softmax(1), 24),
    "sigmoid": (torch.sigmoid, 24),
    "in place": (lambda x: x.mul_(2).clamp_(max=3), 24),
    "joined twice": (lambda x: torch.cat([x, x + 1], 1), 48),
}


def _prunable(net: nn.Module, example: torch.Tensor) -> dict[str, str]:
    return {g.name: g.complete for g in prepare(net.eval(), example, config=CONFIG).groups}


@pytest.mark.parametrize("name", WRONG)
def test_channels_that_cannot_be_followed_stay(name: str) -> None:
    net, images = ConvNet(*WRONG[name]), [torch.randn(10, 3, 8, 8) for _ in range(2)]
    reasons = _prunable(net, images[0])
    assert reasons["c.first"]
    assert not reasons["b.0"]
    assert not reasons["c.last"]
    _check(net, images)


@pytest.mark.parametrize("name", RIGHT)
def test_channels_that_are_followed_go(name: str) -> None:
    net, images = ConvNet(*RIGHT[name]), [torch.randn(10, 3, 8, 8) for _ in range(2)]
    reasons = _prunable(net, images[0])
    assert [reasons[key] for key in ("b.0", "c.first", "c.last")] == ["", "", ""]
    _check(net, images, masked="over channels" not in name)  # statistics are over the channels that are left


def test_attention_by_hand_keeps_its_heads() -> None:
    net, tokens = ViT(), [torch.randn(10, 7, 6) for _ in range(2)]
    reasons = _prunable(net, tokens[0])
    assert {name for name, reason in reasons.items() if not reason} == {"b.mlp.0", "c.mlp.0"}
    assert "graph" in reasons["b.attention.qkv"] or "cut" in reasons["b.attention.qkv"]
    _check(net, tokens)


def _check(net: nn.Module, batches: list[torch.Tensor], *, masked: bool = True) -> None:
    """Every leaf is the dense network without the channels that it lacks: they are zero where they are read."""
    pruner = SigmaBPruner(net, batches[0], calibration_data=batches, config=CONFIG)
    tree = pruner.step().eval()
    x = batches[1]
    with torch.no_grad():
        logits, _ = tree.forward_leaves(x)
        hard, leaf = tree.forward_routed(x)
        torch.testing.assert_close(hard, logits[torch.arange(len(x)), leaf], atol=1e-5, rtol=1e-4)
    if not masked:
        return
    prepared = pruner.prepared
    for number, path in enumerate(tree.leaves):
        kept = tree.plan.kept(path)
        with torch.no_grad():
            value = prepared.segments.enter(x)
            for position, segment in enumerate(prepared.segments.tail):
                value = _without(segment, prepared.groups, kept, position)(value)
        torch.testing.assert_close(logits[:, number], value, atol=1e-4, rtol=1e-3)


def _without(
    segment: nn.Module, groups: tuple[ChannelGroup, ...], kept: dict[str, torch.Tensor], number: int
) -> nn.Module:
    masked = copy.deepcopy(segment)
    tensors = named_tensors(masked)
    for group in groups:
        if group.name in kept:
            gone = torch.ones(group.size, dtype=torch.bool)
            gone[kept[group.name]] = False
            for member in group.members:
                if member.segment == number and member.role == "in":
                    positions, channels = member.pairs(group.size)
                    tensors[member.tensor].data.index_fill_(member.dim, positions[gone[channels]], 0.0)
    return masked


def _scaled_flip(x: torch.Tensor) -> torch.Tensor:
    return x + 1e-4 * x.flip(1)


def _half_dropped(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5, training=True)


def _checked(x: torch.Tensor) -> torch.Tensor:
    if bool((x < 0).any()):
        raise ValueError("negative")
    return x.flip(1)


@pytest.mark.parametrize("function", [_scaled_flip, _checked, lambda x: x.flip(1).log().clamp(-3)])
def test_a_fault_is_found_however_small_or_hidden(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    reasons = _prunable(ConvNet(function), torch.randn(10, 3, 8, 8))
    assert "graph" in reasons["c.first"]
    assert not reasons["b.0"]


def test_classes_that_are_masked_hide_nothing() -> None:
    class MaskedNet(ConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.d(self.c(self.b(torch.relu(self.a(x)))).mean((2, 3)))

    net = MaskedNet(lambda x: x.flip(1))
    with torch.no_grad():
        net.d.bias[2] = -torch.inf
    assert "graph" in _prunable(net, torch.randn(10, 3, 8, 8))["c.first"]


def test_a_network_that_draws_in_eval_is_tried_by_cutting(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="sigmab_plugin.tree.trial"):
        reasons = _prunable(ConvNet(_half_dropped), torch.randn(10, 3, 8, 8))
    assert [reasons[key] for key in ("b.0", "c.first", "c.last")] == ["", "", ""]
    assert any("draws random numbers" in record.message for record in caplog.records)


def test_rounding_of_a_deep_network_is_no_fault() -> None:
    def plain(inputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(45):
            layers += [nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
            inputs = 8
        return nn.Sequential(*layers)

    net = nn.Sequential()
    for name, part in {"a": nn.Conv2d(3, 4, 3), "b": plain(4), "c": plain(8)}.items():
        net.add_module(name, part)
    net.add_module("d", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    net.train()
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    reasons = _prunable(net, torch.randn(2, 3, 8, 8))
    assert [name for name, reason in reasons.items() if reason] == ["d.2"]


def test_widths_of_channels_that_stay_are_refused() -> None:
    config = CONFIG.replace(widths={"c": {"c.first": 8}})
    with pytest.raises(ConfigError, match=r"'c\.first' keeps all 24 channels: the graph is wrong"):
        prepare(ConvNet(lambda x: x.flip(1)).eval(), torch.randn(10, 3, 8, 8), config=config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_groups_that_are_right_stand_the_trial(case: Case) -> None:
    model, data = case.model(), case.batches(1)
    prepared = prepare(model, data[0], config=case.config, **case.options)
    free = [g for g in prepared.groups if g.prunable]
    assert free
    reasons = [g.complete for g in prepared.groups]
    assert not any("graph" in reason or "when it is cut" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["resnet18", "regnet", "vit", "vgg", "densenet", "pointnet2"])
def test_a_wrong_description_is_found(name: str) -> None:
    """One member's channels in another order, or one member forgotten."""
    case = next(case for case in CASES if case.name == name)
    prepared = prepare(case.model(), case.batches(1)[0], config=case.config, **case.options)
    tail = prepared.segments.tail
    frontier = read_example(prepared.segments, prepared.example).frontier
    shapes = prepared.shapes[1:]
    group = max((g for g in prepared.groups if g.prunable), key=lambda g: len(g.members))

    def stands(changed: ChannelGroup) -> bool:
        others = [g for g in prepared.groups if g.name != group.name]
        found = confirmed_groups(
            [*others, changed],
            tail,
            frontier,
            kind=prepared.modalities[0],
            shapes=shapes,
            prober=prepared.prober,
        )
        assert [g.prunable for g in found[:-1]] == [g.prunable for g in others]
        return found[-1].prunable

    assert stands(group)
    reader = next(m for m in group.members if m.role == "in")
    positions, channels = reader.pairs(group.size)
    turned = dataclasses.replace(
        reader, positions=tuple(positions.tolist()), channels=tuple(channels.roll(1).tolist())
    )
    for member in (turned, None):
        members = tuple(m for m in (*[m for m in group.members if m is not reader], member) if m is not None)
        assert not stands(dataclasses.replace(group, members=members))
