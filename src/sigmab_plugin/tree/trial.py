"""Channel groups on trial: what the dependency graph says is run before it is believed.

The graph follows shapes and knows the operations that it was taught. A reshape to attention heads, a channel shuffle, a
flip or a hard-coded size can make it name the wrong channels, or channels that cannot be dropped. Two runs tell:

- Permuted. When all tensors of a group are permuted alike, the network computes what it did; this holds with
  normalisation over channels and softmax, too. It fails where a tensor is missing or its channels are named wrongly.
- Sliced. With some channels dropped the tail must run and give outputs of the same shape.

A group that fails keeps all its channels.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import ChannelGroup, Slices, slice_module, slices_of
from ..channels.probe import Prober
from ..modes import evaluating
from ..tuning.seeding import preserve_random_state
from .segments import call

#: Shares of the channels that the sliced runs keep: sizes that agree by chance in one do not in the other.
_KEPT = (0.5, 0.7)


def confirmed_groups(
    groups: Sequence[ChannelGroup],
    tail: Sequence[nn.Module],
    frontier: Any,
    *,
    shapes: Sequence[dict[str, tuple[int, ...]]],
    prober: Prober | None,
) -> tuple[ChannelGroup, ...]:
    """``groups``; those that do not stand the trial are complete, with the reason.

    Args:
        tail: levels and head.
        frontier: the backbone's output for some samples.
        shapes: tensor name -> shape, for each segment of the tail.
    """
    with evaluating(*tail), preserve_random_state():
        trial = _Trial(tail, frontier, shapes, prober)
        prunable = [group for group in groups if group.prunable]
        if not trial.problem(prunable):
            return tuple(groups)
        stood: list[ChannelGroup] = []
        result = []
        for group in groups:
            if group.prunable:
                problem = trial.problem([*stood, group])
                if problem:
                    group = dataclasses.replace(group, complete=problem)
                else:
                    stood.append(group)
            result.append(group)
    return tuple(result)


class _Trial:
    def __init__(
        self,
        tail: Sequence[nn.Module],
        frontier: Any,
        shapes: Sequence[dict[str, tuple[int, ...]]],
        prober: Prober | None,
    ) -> None:
        self._tail, self._shapes, self._prober = tail, shapes, prober
        self._frontier = _with_noise(frontier)
        self._wanted = self._run(lambda number: tail[number])

    def problem(self, groups: Sequence[ChannelGroup]) -> str:
        """Why these groups cannot be cut as they are described; empty if they can."""
        if not groups:
            return ""
        try:
            found = self._run(lambda number: slice_module(self._tail[number], self._permuted(groups, number)))
            if not self._agrees(found):
                return "its channels cannot be told apart by the graph (reshaped, shuffled or reordered on the way)"
            for share in _KEPT:
                keep = {group.name: _some_channels(group, share) for group in groups}
                found = self._run(functools.partial(self._sliced, groups, keep))
                if found.shape != self._wanted.shape:
                    return "the outputs change their shape when it is cut"
        except Exception as error:  # whatever the user's layers raise with fewer channels
            return f"the network does not run when it is cut ({_first_line(error)})"
        return ""

    def _run(self, segment: Callable[[int], nn.Module]) -> Tensor:
        torch.manual_seed(0)  # a sampling's first point is the same in every run
        value = _cloned(self._frontier)  # layers may work in place
        for number in range(len(self._tail)):
            value = call(segment(number).eval(), value)
        output: Tensor = value
        return output

    def _agrees(self, found: Tensor) -> bool:
        if found.shape != self._wanted.shape:
            return False
        if not bool(torch.isfinite(self._wanted).all()):
            return True  # nothing to compare
        tolerance = math.sqrt(torch.finfo(found.dtype).eps)
        if found.device.type != "cpu":
            tolerance = max(tolerance, 1e-2)  # reduced-precision products
        scale = float(self._wanted.abs().max())
        return float((found - self._wanted).abs().max()) <= tolerance * scale

    def _sliced(self, groups: Sequence[ChannelGroup], keep: dict[str, Tensor], number: int) -> nn.Module:
        module = self._tail[number]
        slices = slices_of(groups, keep, segment=number, shapes=self._shapes[number])
        attributes = self._prober.attributes(module, keep, segment=number) if self._prober else {}
        return slice_module(module, slices, attributes=attributes)

    def _permuted(self, groups: Sequence[ChannelGroup], number: int) -> Slices:
        """Index of every tensor that has all channels of ``groups`` in another order."""
        slices: Slices = {}
        for group in groups:
            order = _reordered(group)
            for member in group.members:
                if member.segment != number:
                    continue
                dims = slices.setdefault(member.tensor, {})
                length = self._shapes[number][member.tensor][member.dim]
                index = dims.setdefault(member.dim, torch.arange(length))
                positions, channels = member.pairs(group.size)
                by_channel = torch.argsort(channels, stable=True)
                positions, channels = positions[by_channel], channels[by_channel]
                starts = torch.searchsorted(channels, torch.arange(group.size))
                rank = torch.arange(len(channels)) - starts[channels]
                index[positions] = positions[starts[order[channels]] + rank]
        return slices


def _reordered(group: ChannelGroup) -> Tensor:
    """A channel for each channel: another one that lies in the same tensors, as often; blocks are treated alike."""
    counts = torch.stack(
        [torch.bincount(member.pairs(group.size)[1], minlength=group.size) for member in group.members]
    )
    block = group.size // group.partitions
    signatures = counts.reshape(len(group.members) * group.partitions, block).T.tolist()
    alike: dict[tuple[int, ...], list[int]] = {}
    generator = torch.Generator().manual_seed(0)
    for offset in torch.randperm(block, generator=generator).tolist():
        alike.setdefault(tuple(signatures[offset]), []).append(offset)
    order = torch.empty(block, dtype=torch.long)
    for offsets in alike.values():
        order[torch.tensor(offsets)] = torch.tensor([*offsets[1:], offsets[0]])
    starts = torch.arange(group.partitions).unsqueeze(1) * block
    return (starts + order).flatten()


def _some_channels(group: ChannelGroup, share: float) -> Tensor:
    block = group.size // group.partitions
    count = max(1, min(block - 1, round(share * block)))
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randperm(block, generator=generator)[:count].sort().values
    starts = torch.arange(group.partitions).unsqueeze(1) * block
    return (starts + offsets).flatten()


def _with_noise(frontier: Any) -> Any:
    """Features of an example of zeros or ones would be alike in all channels."""

    def noisy(x: Tensor) -> Tensor:
        spread = float(x.float().std()) if x.numel() > 1 else 0.0
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator) * (spread if spread > 0 else 1.0)
        return x + noise.to(x)

    if isinstance(frontier, (tuple, list)):
        return (noisy(frontier[0]), *frontier[1:])
    return noisy(frontier)


def _cloned(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_cloned(part) for part in value)
    return value.clone() if torch.is_tensor(value) else value


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
