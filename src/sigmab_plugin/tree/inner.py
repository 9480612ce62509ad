"""Mean activations of inner planes, for ``inner_selection="activation"``.

The paper picks a bottleneck's inner planes by norm, the same ones for both branches. Planes can be
chosen per cluster like the outputs if their activations are known: what the layer that reads them gets.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..channels import ChannelGroup
from ..errors import ModelError
from .modality import Modality, Points, features
from .segments import call

_log = logging.getLogger(__name__)


class InnerActivations:
    """Records the pooled input (B, C) of one reader of every inner group while a segment runs.

    Attributes:
        columns: group name -> its columns in the rows that :meth:`rows` gives. A group is absent
            where no layer reads its channels in order; it keeps the choice by norm.
    """

    def __init__(self, segment: nn.Module, number: int, groups: Sequence[ChannelGroup]) -> None:
        self.columns: dict[str, slice] = {}
        self._segment = segment
        self._readers: list[tuple[str, nn.Module]] = []
        self._seen: dict[str, torch.Tensor] = {}
        start = 0
        for group in groups:
            name = _reader(segment, number, group)
            if name is None:
                _log.info("inner planes of %s are chosen by norm: no layer reads them in order", group.name)
                continue
            self._readers.append((group.name, segment.get_submodule(name)))
            self.columns[group.name] = slice(start, start + group.size)
            start += group.size
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> InnerActivations:
        for group, module in self._readers:
            self._hooks.append(module.register_forward_pre_hook(self._recorder(group)))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _recorder(self, group: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._seen[group] = inputs[0]

        return record

    def rows(self, frontier: Any, modality: Modality) -> torch.Tensor:
        """Pooled activations of the batch that just ran from ``frontier``, (B, sum of C).

        Raises:
            ModelError: a layer is not given one row per sample, nor an equal number of rows in a block per sample.
        """
        size = modality.size(frontier)
        parts = self._pooled(frontier, modality)
        if any(len(part) != size for part in parts):
            parts = self._folded(parts, frontier, modality)
        return torch.cat(parts, dim=1) if parts else torch.empty(size, 0)

    def _pooled(self, frontier: Any, modality: Modality) -> list[torch.Tensor]:
        """What each reader was given in the last run, with one row for each of its first dimension."""
        parts = []
        for group, module in self._readers:
            x = self._seen.pop(group)
            if isinstance(modality, Points) and x.shape[0] == len(frontier[2]):
                parts.append(modality.pool((x, frontier[1], frontier[2])))
            else:
                channels = 1 if isinstance(module, nn.modules.conv._ConvNd) else x.ndim - 1
                others = [dim for dim in range(1, x.ndim) if dim != channels]
                parts.append(x.mean(dim=others) if others else x)
        return parts

    def _folded(self, parts: list[torch.Tensor], frontier: Any, modality: Modality) -> list[torch.Tensor]:
        """The mean over a sample's rows where a level folds windows into the batch.

        Shapes do not tell whether a sample's windows lie together: the samples run once more in
        reverse, and whole blocks must come out in reverse.
        """
        size = modality.size(frontier)
        order = torch.arange(size - 1, -1, -1, device=features(frontier).device)
        backwards = modality.take(frontier, order)
        call(self._segment, backwards)
        again = self._pooled(backwards, modality)
        result = []
        for (group, _), part, other in zip(self._readers, parts, again, strict=True):
            if len(part) == size:
                result.append(part)
                continue
            blocks = part.reshape(size, -1, part.shape[1]) if size and len(part) % size == 0 else None
            if blocks is None or not _close(blocks.flip(0).flatten(0, 1), other):
                raise ModelError(
                    f"the layer that reads {group!r} is given {len(part)} rows for {size} samples, and they are not a "
                    "block of rows for each sample in order: choose inner planes by inner_selection='norm'"
                )
            result.append(blocks.mean(dim=1))
        return result


def _close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal up to the rounding of sums in another order, which is small beside what tells rows apart."""
    if first.shape != second.shape:
        return False
    spread = float((first - first.mean(dim=0)).abs().max())
    return float((first - second).abs().max()) <= 1e-2 * spread + 1e-5 * float(first.abs().max())


def _reader(segment: nn.Module, number: int, group: ChannelGroup) -> str | None:
    """Name of a layer of the segment that reads all channels of the group, in order."""
    for member in group.members:
        in_order = member.positions is None and member.channels is None
        if (
            member.segment == number
            and member.role == "in"
            and in_order
            and member.tensor.endswith(".weight")
        ):
            name = member.tensor.removesuffix(".weight")
            module = segment.get_submodule(name)
            if member.dim == 1 and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                return name
            if member.dim == 1 and hasattr(module, "in_channels") and not list(module.children()):
                return name
    return None
