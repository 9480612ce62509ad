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
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..channels import ChannelGroup, Slices, slice_module, slices_of
from ..channels.probe import Prober
from ..modes import evaluating
from ..tuning.distributed import broadcast_object
from ..tuning.seeding import preserve_random_state
from .agreement import agree
from .allocation import in_every_block
from .modality import Modality, features
from .segments import call

_log = logging.getLogger(__name__)

#: Samples of the example at most.
_SAMPLES = 4
#: Shares of the channels that the sliced runs keep: sizes that agree by chance in one do not in the other.
_KEPT = (0.5, 0.7)


def confirmed_groups(
    groups: Sequence[ChannelGroup],
    tail: Sequence[nn.Module],
    frontier: Any,
    *,
    kind: Modality,
    shapes: Sequence[dict[str, tuple[int, ...]]],
    prober: Prober | None,
) -> tuple[ChannelGroup, ...]:
    """``groups``; those that do not stand the trial are complete, with the reason. All ranks take rank 0's word.

    Args:
        tail: levels and head.
        frontier: the backbone's output for some samples, of modality ``kind``.
        shapes: tensor name -> shape, for each segment of the tail.
    """
    with evaluating(*tail), preserve_random_state():
        few = kind.take(
            frontier, torch.arange(min(_SAMPLES, kind.size(frontier)), device=features(frontier).device)
        )
        problems = _sorted_out(
            _Trial(tail, few, shapes, prober), [group for group in groups if group.prunable], []
        )
    problems = broadcast_object(problems)
    return tuple(
        dataclasses.replace(group, complete=problems[group.name]) if group.name in problems else group
        for group in groups
    )


def _sorted_out(trial: _Trial, groups: list[ChannelGroup], stood: list[ChannelGroup]) -> dict[str, str]:
    """Problems by name; ``stood`` gets the groups that have none. Halves are tried together while they can be."""
    problem = trial.problem([*stood, *groups])
    if not problem:
        stood += groups
        return {}
    if len(groups) == 1:
        return {groups[0].name: problem}
    half = len(groups) // 2
    return {**_sorted_out(trial, groups[:half], stood), **_sorted_out(trial, groups[half:], stood)}


class _Trial:
    """Runs of the tail, in double precision if they can be: rounding must not pass for a fault, or hide one."""

    def __init__(
        self,
        tail: Sequence[nn.Module],
        frontier: Any,
        shapes: Sequence[dict[str, tuple[int, ...]]],
        prober: Prober | None,
    ) -> None:
        self._tail, self._shapes, self._prober = tail, shapes, prober
        self._frontier, self._double, self._wanted = self._first_run(frontier)

    @functools.cached_property
    def _random(self) -> bool:
        """Whether the network draws random numbers in eval mode, so that outputs cannot be compared."""
        again = self._run(self._as_it_is, seed=1)
        random = not agree(again, self._wanted, tolerance=self._tolerance())
        if random:
            _log.info(
                "the network draws random numbers in eval mode: its channel groups are tried by cutting alone"
            )
        return random

    def problem(self, groups: Sequence[ChannelGroup]) -> str:
        """Why these groups cannot be cut as they are described; empty if they can."""
        if not groups:
            return ""
        try:
            found = self._run(lambda number: self._copy(number, self._permuted(groups, number)))
            if not agree(found, self._wanted, tolerance=self._tolerance()) and not self._random:
                return "the graph is wrong about its channels (reshaped, shuffled or reordered on the way)"
            for share in _KEPT:
                keep = {group.name: _some_channels(group, share) for group in groups}
                found = self._run(functools.partial(self._sliced, groups, keep), double=False)
                if found.shape != self._wanted.shape:
                    return "the outputs change their shape when it is cut"
        except Exception as error:  # whatever the user's layers raise with fewer channels
            return f"the network does not run when it is cut ({_first_line(error)})"
        return ""

    def _first_run(self, frontier: Any) -> tuple[Any, bool, Tensor]:
        """Frontier, whether in double precision, and output: the first choice that gives most finite outputs.

        With noise the channels differ whatever the example is, but a layer may refuse what it has not seen.
        """
        noisy = _with_noise(frontier)
        best: tuple[Any, bool, Tensor] | None = None
        for value, double in ((noisy, True), (noisy, False), (frontier, True), (frontier, False)):
            self._frontier, self._double = value, double
            try:
                output = self._run(self._as_it_is)
            except Exception as error:
                if best is None and value is frontier and not double:
                    raise
                _log.debug("the trial of channel groups starts otherwise: %s", error)
                continue
            if best is None or output.isfinite().sum() > best[2].isfinite().sum():
                best = (value, double, output)
            if bool(output.isfinite().all()):
                break
        assert best is not None
        return best

    def _as_it_is(self, number: int) -> nn.Module:
        return self._copy(number, {}) if self._double else self._tail[number]

    def _copy(self, number: int, slices: Slices) -> nn.Module:
        return slice_module(self._tail[number], slices, dtype=torch.float64 if self._double else None)

    def _run(
        self, segment: Callable[[int], nn.Module], *, seed: int = 0, double: bool | None = None
    ) -> Tensor:
        torch.manual_seed(seed)  # a sampling's first point is the same in every run
        double = self._double if double is None else double
        value = _cloned(self._frontier, double=double)  # layers may work in place
        for number in range(len(self._tail)):
            module = segment(number).eval()
            value = call(module, value)
            if module is not self._tail[number]:
                _release(module)
        output: Tensor = value
        return output

    def _tolerance(self) -> float:
        tolerance = math.sqrt(torch.finfo(self._wanted.dtype).eps)
        if self._wanted.device.type != "cpu" and self._wanted.dtype == torch.float32:
            return max(tolerance, 1e-2)  # products of reduced precision
        return tolerance

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


def _release(module: nn.Module) -> None:
    """Give back a copy's memory now: traced modules hold themselves in cycles until they are collected."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.new_empty(0)


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
    return in_every_block(order, group.partitions, block)


def _some_channels(group: ChannelGroup, share: float) -> Tensor:
    block = group.size // group.partitions
    count = max(1, min(block - 1, round(share * block)))
    generator = torch.Generator().manual_seed(1)
    offsets = torch.randperm(block, generator=generator)[:count].sort().values
    return in_every_block(offsets, group.partitions, block)


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


def _cloned(value: Any, *, double: bool) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_cloned(part, double=double) for part in value)
    if not torch.is_tensor(value):
        return value
    return (
        value.double()
        if double and value.dtype in (torch.float32, torch.bfloat16, torch.float16)
        else value.clone()
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
