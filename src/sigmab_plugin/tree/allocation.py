"""Which channels each branch keeps (arXiv 2606.09924, phase 2), and how many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..channels import ChannelGroup
from ..config import SigmaBConfig, WidthSpec
from ..errors import ConfigError


def default_width(channels: int, branches: int) -> int:
    """floor(C / sqrt(n)): n parallel branches hold about as many weights as the dense level."""
    return max(1, math.isqrt(channels * channels // branches))


def fit_width(width: int, group: ChannelGroup, round_to: int | None) -> int:
    """The largest legal width not above ``width``: a multiple of ``round_to`` and of the blocks."""
    step = math.lcm(group.partitions, round_to or 1)
    if width >= group.size:
        return group.size
    legal = width // step * step
    if legal == 0:
        legal = step if step <= group.size else group.size
    return legal


def width_of(
    group: ChannelGroup,
    *,
    config: SigmaBConfig,
    branch: str,
    level: str,
    branches: int,
    scale: float = 1.0,
) -> int:
    """Channels of ``group`` that branch ``branch`` (path such as ``"0/1"``) of ``level`` keeps.

    A width under the branch's path wins over one under the level's name; a layer's own name wins
    over ``"output"`` / ``"inner"``; without any, :func:`default_width` times ``scale``.

    Raises:
        ConfigError: the width is below 1, above the dense one, or no multiple of the group's blocks.
    """
    for key in (branch, level):
        if key not in config.widths:
            continue
        asked = _asked(config.widths[key], group)
        if asked is None:
            continue
        if not 1 <= asked <= group.size:
            raise ConfigError(
                f"widths[{key!r}]: {asked} channels asked of {group.name!r}, which has {group.size} in the dense model"
            )
        if asked % group.partitions:
            raise ConfigError(
                f"widths[{key!r}]: {asked} is no multiple of {group.partitions}, the blocks of {group.name!r} "
                "(grouped convolution, heads or group normalisation)"
            )
        return asked
    width = math.floor(scale * default_width(group.size, branches) + 1e-9)
    return fit_width(min(group.size, max(1, width)), group, config.round_to)


def _asked(spec: WidthSpec, group: ChannelGroup) -> int | None:
    if isinstance(spec, int):
        return spec if group.is_output() else None
    for name in (group.name, *layers_of(group)):
        if name in spec:
            return spec[name]
    return spec.get("output" if group.is_output() else "inner")


def layers_of(group: ChannelGroup) -> list[str]:
    """Names of the layers that produce the group's channels."""
    return list(dict.fromkeys(m.tensor.rpartition(".")[0] for m in group.members if m.role == "out"))


def check_widths(config: SigmaBConfig, groups: Iterable[ChannelGroup], levels: Sequence[str]) -> None:
    """Raise ConfigError for width keys that name nothing, or channels that all stay."""
    paths = {"/".join(bits) for depth in range(1, len(levels)) for bits in _paths(depth)}
    groups = list(groups)
    named = {name: group for group in groups for name in (group.name, *layers_of(group))}
    for key, spec in config.widths.items():
        if key not in levels and key not in paths:
            raise ConfigError(
                f"widths: {key!r} is neither a level ({', '.join(levels)}) nor a branch such as '0' or '0/1'"
            )
        for inner, asked in spec.items() if isinstance(spec, dict) else ():
            if inner not in ("output", "inner") and inner not in named:
                raise ConfigError(f"widths[{key!r}]: no group of channels belongs to a layer {inner!r}")
            group = named.get(inner)
            if group is not None and group.complete and asked != group.size:
                raise ConfigError(
                    f"widths[{key!r}]: {inner!r} keeps all {group.size} channels: {group.complete}"
                )


def _paths(depth: int) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = [()]
    for _ in range(depth):
        paths = [(*path, bit) for path in paths for bit in ("0", "1")]
    return paths


def top_channels(scores: torch.Tensor, width: int, partitions: int = 1) -> torch.Tensor:
    """The ``width`` channels of largest score, ascending; the lower index wins a tie.

    With ``partitions`` blocks, offsets are ranked by their mean over blocks and kept in all.
    """
    if partitions > 1:
        per_block = scores.reshape(partitions, -1).mean(dim=0)
        offsets = top_channels(per_block, width // partitions)
        return in_every_block(offsets, partitions, len(per_block))
    order = torch.argsort(scores.double(), descending=True, stable=True)
    return torch.sort(order[:width]).values


def in_every_block(offsets: torch.Tensor, partitions: int, block: int) -> torch.Tensor:
    """Channels at ``offsets`` of each of ``partitions`` blocks of ``block`` channels, block after block."""
    starts = torch.arange(partitions).unsqueeze(1) * block
    return (starts + offsets).flatten()


def split_channels(
    activation: torch.Tensor,
    widths: tuple[int, int],
    *,
    shared_ratio: float,
    partitions: int = 1,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Shared and specific channels of two branches.

    The floor(kappa W) channels with the largest min(a(0), a(1)) go to both; each branch c fills up
    with the channels of largest a(c) - a(1-c) among the rest. Unequal widths share kappa times the
    smaller.

    Args:
        activation: (2, C) mean activation of every channel given the cluster.

    Returns:
        shared (S,), and for each branch all that it keeps (W_c,), shared ones included; ascending.
    """
    if partitions > 1:
        blocks = activation.reshape(2, partitions, -1).mean(dim=1)
        small = (widths[0] // partitions, widths[1] // partitions)
        shared, kept = split_channels(blocks, small, shared_ratio=shared_ratio)
        spread = [in_every_block(part, partitions, blocks.shape[1]) for part in (shared, *kept)]
        return spread[0], (spread[1], spread[2])
    a = activation.double()
    count = math.floor(shared_ratio * min(widths) + 1e-9)
    shared = top_channels(a.min(dim=0).values, count)
    rest = torch.ones(a.shape[1], dtype=torch.bool)
    rest[shared] = False
    branches = []
    for branch in (0, 1):
        margin = torch.where(rest, a[branch] - a[1 - branch], torch.full_like(a[0], -math.inf))
        specific = top_channels(margin, widths[branch] - count)
        branches.append(torch.sort(torch.cat([shared, specific])).values)
    return shared, (branches[0], branches[1])


def filter_norms(group: ChannelGroup, tensors: Mapping[tuple[int, str], torch.Tensor]) -> torch.Tensor:
    """L1 norm of the filters that produce each channel, (C,): the default score of inner planes."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        weight = tensors[member.segment, member.tensor]
        if member.role != "out" or weight.ndim < 2:
            continue
        norms = weight.detach().double().abs().transpose(0, member.dim).flatten(1).sum(dim=1).cpu()
        positions, channels = member.pairs(group.size)
        total.index_add_(0, channels, norms[positions])
    return total
