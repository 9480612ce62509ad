"""A row of segments with anchors between them, as the DependencyGraph is shown a tail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


class ChannelAnchor(nn.Module):
    """x * 1 per channel: the identity, visible to the DependencyGraph as a layer of known width."""

    def __init__(self, channels: int, dim: int, ndim: int) -> None:
        super().__init__()
        self.channels = channels
        shape = [1] * (ndim - dim)
        shape[0] = channels
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.to(x.dtype)


class Anchors(nn.Module):
    """Anchors every floating-point tensor of a frontier; ``dims[i]`` is its channel dimension."""

    def __init__(self, frontier: tuple[Any, ...], dims: Sequence[int | None]) -> None:
        super().__init__()
        self.items = nn.ModuleList(
            ChannelAnchor(value.shape[dim], dim, value.ndim) if dim is not None else nn.Identity()
            for value, dim in zip(frontier, dims, strict=True)
        )

    def forward(self, *frontier: Any) -> tuple[Any, ...]:
        return tuple(
            item(value) if isinstance(item, ChannelAnchor) else value
            for item, value in zip(self.items, frontier, strict=True)
        )


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


class Chain(nn.Module):
    """Levels and head in a row, with anchors before each segment and behind the last one."""

    def __init__(
        self,
        tail: Sequence[nn.Module],
        frontier: Any,
        channel_dim: Callable[[Any, int], int],
        output_transform: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__()
        self.segments = nn.ModuleList(tail)
        self._output_transform = output_transform or (lambda output: output)
        anchors: list[Anchors] = []
        with torch.no_grad():
            for segment in (*tail, None):
                if segment is None:
                    frontier = self._output_transform(frontier)
                values = as_tuple(frontier)
                dims = [
                    channel_dim(values, i)
                    if torch.is_tensor(v) and v.is_floating_point() and v.ndim > 1
                    else None
                    for i, v in enumerate(values)
                ]
                anchors.append(Anchors(values, dims).to(next(v for v in values if torch.is_tensor(v)).device))
                if segment is not None:
                    frontier = segment(*values)
                elif len(values) != 1 or dims[0] is None:
                    raise ModelError(
                        "the model must return one tensor of logits (B, classes); wrap it, or pass output_transform="
                    )
        self.anchors = nn.ModuleList(anchors)

    def forward(self, *inputs: Any) -> Any:
        frontier: Any = inputs
        for anchors, segment in zip(self.anchors[:-1], self.segments, strict=True):
            frontier = segment(*anchors(*as_tuple(frontier)))
        return self.anchors[-1](*as_tuple(self._output_transform(frontier)))[0]


def anchor_pruner(tp: Any) -> Any:
    base = tp.pruner.function.BasePruningFunc if hasattr(tp.pruner, "function") else tp.BasePruningFunc

    class AnchorPruner(base):  # type: ignore[misc, valid-type]
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            raise RuntimeError("anchors exist while tracing only")

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: ChannelAnchor) -> int:
            return layer.channels

        get_in_channels = get_out_channels

    return AnchorPruner()
