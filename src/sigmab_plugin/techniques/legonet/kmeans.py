"""k-means for millions of short vectors: float32, blockwise assignment by matrix products, seeded.

The search for centroids runs Lloyd's passes on one sample until they converge (mini-batch phase) and is
finished with a pass over all points, so centroids are means, not running averages of mini-batches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import CalibrationError

logger = logging.getLogger(__name__)

#: Points x centroids scored at a time; 512 Ki float32 fit a core's share of the cache.
_SCORES = 1 << 19
#: Points per centroid and least points of the mini-batch phase.
_SAMPLE_PER_CENTROID = 512
_SAMPLE_MINIMUM = 65_536
#: k-means++ looks at so many points per centroid; more change the start, not the end.
_SEEDING_PER_CENTROID = 64


@dataclass(frozen=True)
class Clustering:
    """Result of :func:`kmeans`.

    Attributes:
        centroids: ``(K, D)`` float32.
        index: ``(N,)`` int64, nearest centroid of every point.
        distortion: mean over points of the squared distance to the nearest centroid.
        passes: passes over all points, the last assignment included.
    """

    centroids: Tensor
    index: Tensor
    distortion: float
    passes: int


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid ``(N,)`` int64 of ``points`` (N, D) and its squared distance ``(N,)`` float32.

    Uses argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2; no (N, K) matrix is kept.
    """
    half_norm = 0.5 * centroids.square().sum(1)
    transposed = centroids.T.contiguous()
    index = torch.empty(points.shape[0], dtype=torch.int64)
    distance = torch.empty(points.shape[0], dtype=torch.float32)
    rows = max(256, _SCORES // centroids.shape[0])
    for start in range(0, points.shape[0], rows):
        chunk = points[start : start + rows]
        score, nearest = torch.addmm(half_norm.neg(), chunk, transposed).max(1)
        index[start : start + rows] = nearest
        distance[start : start + rows] = chunk.square().sum(1).sub_(score, alpha=2)
    return index, distance.clamp_(min=0)


def _means(points: Tensor, index: Tensor, distance: Tensor, centroids: Tensor) -> Tensor:
    """Mean of the points of each centroid; an empty one takes over a point that is served worst."""
    count = torch.bincount(index, minlength=centroids.shape[0])
    sums = torch.zeros(centroids.shape, dtype=torch.float64)
    # Chunked, so that float32 partial sums stay short and the result does not depend on N's order.
    for part, where in zip(points.split(65_536), index.split(65_536), strict=True):
        sums += torch.zeros_like(centroids).index_add_(0, where, part)
    means = (sums / count.clamp(min=1)[:, None]).to(torch.float32)
    empty = (count == 0).nonzero().flatten()
    if len(empty):
        worst = distance.topk(min(len(empty), len(points))).indices
        means[empty[: len(worst)]] = points[worst]
    return means


def _seed_centroids(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ on a part of ``points``: each next centroid is drawn with chance ~ squared distance."""
    limit = max(4096, _SEEDING_PER_CENTROID * count)
    if len(points) > limit:
        points = points[torch.randperm(len(points), generator=generator)[:limit]]
    centroids = points.new_empty(count, points.shape[1])
    chosen = int(torch.randint(len(points), (1,), generator=generator))
    nearest = torch.full((len(points),), torch.inf)
    norms = points.square().sum(1)
    for k in range(count):
        centroids[k] = points[chosen]
        distance = (norms - 2 * (points @ centroids[k]) + norms[chosen]).clamp_(min=0)
        nearest = torch.minimum(nearest, distance)
        cumulative = nearest.to(torch.float64).cumsum(0)
        if not cumulative[-1] > 0:  # fewer distinct points than centroids: any point will do
            chosen = int(torch.randint(len(points), (1,), generator=generator))
            continue
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = min(int(torch.searchsorted(cumulative, draw)), len(points) - 1)
    return centroids


def _lloyd(points: Tensor, centroids: Tensor, passes: int, tolerance: float) -> tuple[Tensor, int]:
    """Up to ``passes`` Lloyd passes; stops when one gains less than ``tolerance`` of the distortion."""
    previous = float("inf")
    for done in range(passes):
        index, distance = assign(points, centroids)
        centroids = _means(points, index, distance, centroids)
        distortion = float(distance.sum(dtype=torch.float64))
        if previous - distortion <= tolerance * distortion:
            return centroids, done + 1
        previous = distortion
    return centroids, passes


def kmeans(
    points: Tensor,
    count: int,
    *,
    iterations: int = 25,
    tolerance: float = 1e-4,
    sample: int | None = None,
    full_passes: int = 1,
    seed: int = 0,
) -> Clustering:
    """Cluster ``points`` (N, D) around ``count`` centroids.

    Args:
        iterations: passes of the mini-batch phase at most.
        tolerance: relative gain of a pass below which a phase ends.
        sample: points of the mini-batch phase; by default 512 per centroid and at least 65 536.
            With at least N of them there is one phase, over everything.
        full_passes: passes over all points after the mini-batch phase.

    Raises:
        CalibrationError: no points, or values that are not finite.
    """
    if points.ndim != 2 or not len(points):
        raise CalibrationError(f"k-means needs points of shape (N, D), N > 0; got {tuple(points.shape)}")
    points = points.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(points.sum()) and not torch.isfinite(points).all():
        raise CalibrationError("weights hold NaN or infinity; look for the layer and retrain or ignore it")
    generator = torch.Generator().manual_seed(seed)
    size = max(_SAMPLE_MINIMUM, _SAMPLE_PER_CENTROID * count) if sample is None else sample
    passes = full_passes
    if size < len(points):
        subset = points[torch.randint(len(points), (size,), generator=generator)]
        centroids = _seed_centroids(subset, count, generator)
        centroids, _ = _lloyd(subset, centroids, iterations, tolerance)
    else:
        centroids = _seed_centroids(points, count, generator)
        passes = iterations
    centroids, done = _lloyd(points, centroids, passes, tolerance)
    index, distance = assign(points, centroids)
    distortion = float(distance.mean(dtype=torch.float64))
    logger.debug(
        "k-means: %d points, %d centroids, %d passes, %.4g", len(points), count, done + 1, distortion
    )
    return Clustering(centroids=centroids, index=index, distortion=distortion, passes=done + 1)
