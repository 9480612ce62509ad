from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmab_plugin.channels import ChannelGroup
from sigmab_plugin.config import SigmaBConfig
from sigmab_plugin.errors import ConfigError
from sigmab_plugin.tree.allocation import default_width, fit_width, split_channels, top_channels, width_of


def _group(size: int, partitions: int = 1) -> ChannelGroup:
    return ChannelGroup("layer", size, 0, (), {1: None}, partitions)  # type: ignore[dict-item]


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_default_width_is_the_floor(channels: int, branches: int) -> None:
    width = default_width(channels, branches)
    assert width == max(1, math.floor(channels / math.sqrt(branches) + 1e-9))


def test_published_widths() -> None:
    assert [default_width(c, n) for c, n in ((1024, 2), (256, 2), (2048, 4), (512, 4))] == [
        724,
        181,
        1024,
        256,
    ]


def _by_hand(a: torch.Tensor, width: int, percent: int) -> tuple[set[int], set[int], set[int]]:
    """Phase 2 in the plainest words."""
    channels = range(a.shape[1])
    by_min = sorted(channels, key=lambda c: (-min(float(a[0, c]), float(a[1, c])), c))
    shared = set(by_min[: percent * width // 100])
    sides = []
    for branch in (0, 1):
        rest = [c for c in channels if c not in shared]
        rest.sort(key=lambda c: (-(float(a[branch, c]) - float(a[1 - branch, c])), c))
        sides.append(shared | set(rest[: width - len(shared)]))
    return shared, sides[0], sides[1]


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 100), st.integers(0, 1000), st.data())
def test_split_is_phase_two(channels: int, percent: int, seed: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, channels))
    a = torch.rand(2, channels, generator=torch.Generator().manual_seed(seed))
    shared, kept = split_channels(a, (width, width), shared_ratio=percent / 100)
    expected = _by_hand(a.double(), width, percent)
    assert set(shared.tolist()) == expected[0]
    for branch in (0, 1):
        assert set(kept[branch].tolist()) == expected[1 + branch]
        assert kept[branch].tolist() == sorted(kept[branch].tolist())
        assert len(kept[branch]) == width


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000), st.data())
def test_blocks_keep_the_same_offsets(blocks: int, size: int, seed: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(1, size))
    a = torch.rand(2, blocks * size, generator=torch.Generator().manual_seed(seed))
    _, kept = split_channels(a, (each * blocks, each * blocks), shared_ratio=0.5, partitions=blocks)
    for index in (*kept, top_channels(a[0], each * blocks, blocks)):
        offsets = index.reshape(blocks, each) % size
        assert bool((offsets == offsets[:1]).all())
        assert torch.equal(index // size, torch.arange(blocks).repeat_interleave(each))


def test_ties_go_to_the_lower_index() -> None:
    assert top_channels(torch.zeros(6), 3).tolist() == [0, 1, 2]


def test_rounding_and_blocks() -> None:
    assert fit_width(181, _group(256), 8) == 176
    assert fit_width(181, _group(256, 32), None) == 160
    assert fit_width(3, _group(256), 8) == 8
    assert fit_width(300, _group(256), 100) == 256


def test_widths_by_branch_level_and_layer() -> None:
    config = SigmaBConfig(levels=("a",), head="h", widths={"a": {"output": 5, "inner": 3}, "1": 7})
    options = {"config": config, "level": "a", "branches": 2}
    assert width_of(_group(10), branch="0", **options) == 5
    assert width_of(_group(10), branch="1", **options) == 7
    inner = ChannelGroup("inner", 10, 0, ())
    assert width_of(inner, branch="1", **options) == 3
    named = config.replace(widths={"a": {"inner": 3, "output": 5}, "0": {"layer": 9}})
    assert width_of(_group(10), config=named, branch="0", level="a", branches=2) == 9


def test_width_over_the_dense_one_is_refused() -> None:
    config = SigmaBConfig(levels=("a",), head="h", widths={"a": 11})
    with pytest.raises(ConfigError, match="11 channels asked of 'layer', which has 10"):
        width_of(_group(10), config=config, branch="0", level="a", branches=2)
    config = config.replace(widths={"a": 6})
    with pytest.raises(ConfigError, match="no multiple of 4"):
        width_of(_group(12, 4), config=config, branch="0", level="a", branches=2)
