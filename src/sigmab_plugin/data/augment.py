"""Augmentation of whole batches; every random number comes from the generator given."""

from __future__ import annotations

import torch
from torch import Tensor

PointBatch = tuple[Tensor, Tensor]


def cifar_augment(images: Tensor, generator: torch.Generator, *, padding: int = 4) -> Tensor:
    """Random crop after padding with zeros, and random horizontal flip: (B, C, H, W) -> (B, C, H, W)."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding] * 4)
    top = torch.randint(2 * padding + 1, (count,), generator=generator)
    left = torch.randint(2 * padding + 1, (count,), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    sample = torch.arange(count)[:, None, None]
    return (
        padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def point_cloud_augment(
    batch: PointBatch,
    generator: torch.Generator,
    *,
    scale: tuple[float, float] = (0.8, 1.25),
    shift: float = 0.1,
    jitter: float = 0.0,
    dropout: float = 0.0,
) -> PointBatch:
    """Random scale and shift per cloud, jitter per point, and dropout of points; (pos, batch) -> (pos, batch).

    Args:
        scale: factors are uniform between these two.
        shift: of each coordinate, uniform in [-shift, shift].
        jitter: standard deviation of Gaussian noise per coordinate, cut at 4 of them.
        dropout: each cloud loses a share of its points that is uniform in [0, dropout]. Lost points take
            the place of the cloud's first point, so that sizes stay, as in the reference code.
    """
    pos, index = batch
    clouds = int(index[-1]) + 1
    factor = torch.rand(clouds, 1, generator=generator) * (scale[1] - scale[0]) + scale[0]
    offset = (torch.rand(clouds, 3, generator=generator) * 2 - 1) * shift
    if dropout > 0:
        share = torch.rand(clouds, generator=generator) * dropout
        lost = torch.rand(len(pos), generator=generator) < share[index]
        sizes = torch.bincount(index, minlength=clouds)
        first = sizes.cumsum(0) - sizes
        pos = torch.where(lost[:, None], pos[first[index]], pos)
    pos = pos * factor[index] + offset[index]
    if jitter > 0:
        noise = torch.randn(pos.shape, generator=generator).clamp_(-4, 4)
        pos = pos + noise * jitter
    return pos, index
