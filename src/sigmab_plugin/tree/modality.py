"""What depends on the kind of data: pool a feature, take some samples of it, know its channels.

A *frontier* is what crosses a cut: a tensor, or a tuple whose first entry holds the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ..errors import ModelError


class Modality(Protocol):
    """One kind of data. ``name`` goes into the plan."""

    name: str

    def pool(self, frontier: Any) -> torch.Tensor:
        """Mean feature per sample, (B, C)."""

    def take(self, frontier: Any, index: torch.Tensor) -> Any:
        """The frontier of samples ``index`` (n,), in that order."""

    def size(self, frontier: Any) -> int:
        """Number of samples B."""

    def join(self, parts: Sequence[Any]) -> Any:
        """Frontiers of several groups of samples as one, in order."""

    def channel_dim(self, values: tuple[Any, ...], position: int) -> int:
        """Channel dimension of entry ``position`` of a frontier."""


def features(frontier: Any) -> torch.Tensor:
    """The feature tensor of a frontier."""
    tensor: torch.Tensor = frontier[0] if isinstance(frontier, (tuple, list)) else frontier
    return tensor


def _map(frontier: Any, index: torch.Tensor) -> Any:
    if isinstance(frontier, (tuple, list)):
        return tuple(value.index_select(0, index) if torch.is_tensor(value) else value for value in frontier)
    return frontier.index_select(0, index)


class Vectors:
    """(B, C)."""

    name = "vectors"

    def pool(self, frontier: Any) -> torch.Tensor:
        return features(frontier)

    def take(self, frontier: Any, index: torch.Tensor) -> Any:
        return _map(frontier, index)

    def size(self, frontier: Any) -> int:
        return features(frontier).shape[0]

    def join(self, parts: Sequence[Any]) -> Any:
        if len(parts) == 1:
            return parts[0]
        if not isinstance(parts[0], (tuple, list)):
            return torch.cat(list(parts))
        columns = zip(*parts, strict=True)
        return tuple(torch.cat(column) if torch.is_tensor(column[0]) else column[0] for column in columns)

    def channel_dim(self, values: tuple[Any, ...], position: int) -> int:
        ndim: int = values[position].ndim
        return ndim - 1 if ndim <= 3 else 1


class Images(Vectors):
    """(B, C, H, W); also (B, C, L) and (B, C, D, H, W). Pooled by the global average."""

    name = "images"

    def pool(self, frontier: Any) -> torch.Tensor:
        return features(frontier).flatten(2).mean(dim=2)

    def channel_dim(self, values: tuple[Any, ...], position: int) -> int:
        return 1


class Tokens(Vectors):
    """(B, N, C), class token included. Pooled by the mean over tokens."""

    name = "tokens"

    def pool(self, frontier: Any) -> torch.Tensor:
        return features(frontier).mean(dim=1)


class ChannelsLast(Vectors):
    """(B, H, W, C) features, as Swin keeps them. Pooled by the global average."""

    name = "channels_last"

    def pool(self, frontier: Any) -> torch.Tensor:
        return features(frontier).flatten(1, -2).mean(dim=1)

    def channel_dim(self, values: tuple[Any, ...], position: int) -> int:
        return int(values[position].ndim) - 1


class Points(Vectors):
    """torch-geometric's (x (N, C), pos (N, 3), batch (N,)): points of B clouds, ``batch`` ascending."""

    name = "points"

    def pool(self, frontier: Any) -> torch.Tensor:
        x, _, batch = frontier
        total = self.size(frontier)
        sums = x.new_zeros(total, x.shape[1]).index_add_(0, batch, x)
        counts = torch.bincount(batch, minlength=total).clamp_(min=1)
        means: torch.Tensor = sums / counts.unsqueeze(1)
        return means

    def take(self, frontier: Any, index: torch.Tensor) -> Any:
        x, pos, batch = frontier
        total = self.size(frontier)
        rank = torch.full((total,), -1, dtype=torch.long, device=batch.device)
        rank[index] = torch.arange(len(index), device=batch.device)
        renumbered = rank[batch]
        rows = (renumbered >= 0).nonzero().flatten()
        # Clouds in the order of ``index``, points in their own order.
        rows = rows[torch.argsort(renumbered[rows], stable=True)]
        return x[rows], pos[rows], renumbered[rows]

    def join(self, parts: Sequence[Any]) -> Any:
        shifted, start = [], 0
        for x, pos, batch in parts:
            shifted.append((x, pos, batch + start))
            start += self.size((x, pos, batch))
        return super().join(shifted)

    def size(self, frontier: Any) -> int:
        batch = frontier[2]
        return int(batch[-1]) + 1 if len(batch) else 0

    def channel_dim(self, values: tuple[Any, ...], position: int) -> int:
        return 1


_KINDS = {kind.name: kind for kind in (Vectors, Images, Tokens, ChannelsLast, Points)}


def modality(name: str) -> Modality:
    """The modality called ``name`` in a plan."""
    if name not in _KINDS:
        raise ModelError(f"unknown modality {name!r}; known: {', '.join(_KINDS)}")
    return _KINDS[name]()


def check_features(frontier: Any, cut: str) -> None:
    """Raises ModelError unless the frontier has features, and one row per sample in each of its tensors."""
    if is_point_cloud(frontier):
        return
    x = features(frontier) if not isinstance(frontier, (tuple, list)) or len(frontier) else None
    if not torch.is_tensor(x) or not x.is_floating_point():
        raise ModelError(
            f"the first value that crosses the cut at {cut!r} must hold features; it is {_describe(x)}"
        )
    for number, value in enumerate(frontier if isinstance(frontier, (tuple, list)) else ()):
        if torch.is_tensor(value) and (value.ndim == 0 or len(value) != len(x)):
            raise ModelError(
                f"value {number} that crosses the cut at {cut!r} has shape {tuple(value.shape)} beside features of "
                f"shape {tuple(x.shape)}, so it cannot be divided among branches: expand it to the batch before the "
                "cut, or compute it behind the cut"
            )
    if x.ndim not in (2, 3, 4, 5):
        raise ModelError(
            f"features of shape {tuple(x.shape)} at the cut {cut!r} are none of (B,C), (B,C,H,W), (B,N,C), point clouds"
        )


def is_point_cloud(values: Any) -> bool:
    """Whether this is torch-geometric's (x, pos, batch)."""
    if (
        not isinstance(values, (tuple, list))
        or len(values) != 3
        or not all(torch.is_tensor(v) for v in values)
    ):
        return False
    x, pos, batch = values
    if not (x.ndim == pos.ndim == 2 and batch.ndim == 1 and len(x) == len(pos) == len(batch) > 0):
        return False
    if batch.is_floating_point() or pos.shape[1] not in (2, 3):
        return False
    steps = batch.diff()
    return int(batch[0]) == 0 and bool(((steps == 0) | (steps == 1)).all())


def _describe(value: Any) -> str:
    return f"a tensor of {value.dtype}" if torch.is_tensor(value) else type(value).__name__
