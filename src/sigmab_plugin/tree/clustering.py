"""Spherical k-means on latents (arXiv 2606.09924, phase 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CalibrationError

_BLOCK = 65536  # rows per matrix product; bounds the temporary similarities


@dataclass(frozen=True)
class Clustering:
    """Result of :func:`spherical_kmeans`.

    Attributes:
        centroids: (k, D) unit vectors.
        assignment: (N,) index of the nearest centroid of each row.
        objective: mean cosine similarity of the rows to their centroid.
        threshold: balanced halves only: rows whose product with ``centroids[0] - centroids[1]`` is larger are
            in cluster 0; otherwise 0.
    """

    centroids: torch.Tensor
    assignment: torch.Tensor
    objective: float
    threshold: float = 0.0


def spherical_kmeans(
    latents: torch.Tensor, k: int = 2, *, restarts: int = 10, iterations: int = 100, seed: int = 0
) -> Clustering:
    """Cluster rows by cosine similarity; the best of ``restarts`` runs.

    All restarts advance together, one matrix product per block of rows. The result depends on the
    set of rows, not on their order: rows are visited in a canonical order, so that several processes
    that hold parts of the data agree with one that holds all.

    Args:
        latents: (N, D), any scale; computed in float32 on the latents' device.

    Raises:
        CalibrationError: fewer than ``k`` rows, NaN, or no two different directions.
    """
    if latents.ndim != 2 or len(latents) < k:
        raise CalibrationError(
            f"{k} clusters need at least {k} samples; got latents of shape {tuple(latents.shape)}"
        )
    latents = latents.detach().float()
    if not bool(torch.isfinite(latents).all()):
        bad = int((~torch.isfinite(latents).all(dim=1)).nonzero()[0])
        raise CalibrationError(
            f"the latent of sample {bad} is not finite: check the calibration data and the model"
        )
    rows = torch.nn.functional.normalize(latents, dim=1)
    rows = rows[_canonical_order(rows)]
    centroids = _initial(rows, k, restarts, seed)
    best_centroids, best_objective = centroids[0], -float("inf")
    previous: torch.Tensor | None = None
    for _ in range(iterations):
        sums, counts, objective, worst, labels = _assign(rows, centroids)
        valid = (counts > 0).all(dim=1)
        scores = torch.where(valid, objective, torch.full_like(objective, -float("inf")))
        leader = int(scores.argmax())
        if float(scores[leader]) > best_objective:
            best_objective, best_centroids = float(scores[leader]), centroids[leader].clone()
        if previous is not None and bool(valid.all()) and torch.equal(labels, previous):
            break
        previous = labels
        centroids = _updated(rows, centroids, sums, counts, worst)
    # The same product as the router's, so that routing reproduces the partition.
    assignment = torch.nn.functional.linear(latents, best_centroids).argmax(dim=1)
    # Directions that differ by rounding alone may fall together here although their run kept them apart.
    if best_objective == -float("inf") or not bool(torch.bincount(assignment, minlength=k).all()):
        raise CalibrationError(
            "all calibration samples give the same latent direction, so that they cannot be split: "
            "give more varied data"
        )
    return Clustering(best_centroids, assignment, best_objective)


def balanced_halves(latents: torch.Tensor, start: Clustering, *, iterations: int = 100) -> Clustering:
    """Two clusters of equal size, from a clustering with two centroids.

    Rows go to cluster 0 by how much nearer they are to its centroid, the nearer half of them; centroids are the mean
    directions of their rows, in turns until no row moves. Not part of the paper.

    Args:
        latents: (N, D), as for :func:`spherical_kmeans`; a threshold on the product with unnormalised rows splits
            them, so that a router can do the same with a bias.
    """
    latents = latents.detach().float()
    rows = torch.nn.functional.normalize(latents, dim=1)
    centroids = start.centroids
    nearer, threshold = _nearer_half(latents, centroids)
    for _ in range(iterations):
        if bool(nearer.all()) or not bool(nearer.any()):  # half of the rows or more are the same
            return start
        means = torch.stack([rows[part].double().mean(dim=0) for part in (nearer, ~nearer)])
        centroids = torch.nn.functional.normalize(means, dim=1).float()
        before, (nearer, threshold) = nearer, _nearer_half(latents, centroids)
        if torch.equal(before, nearer):
            break
    assignment = (~nearer).long()
    objective = float((rows * centroids[assignment]).sum(dim=1, dtype=torch.float64).mean())
    return Clustering(centroids, assignment, objective, threshold)


def _nearer_half(latents: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Rows nearer to centroid 0 than the middle one is, and the threshold that says so."""
    first, second = torch.nn.functional.linear(latents, centroids).unbind(dim=1)
    ordered = (first - second).sort().values
    middle = len(ordered) // 2
    threshold = float((ordered[middle - 1] + ordered[middle]) / 2)
    return first - threshold > second, threshold


def _canonical_order(rows: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(rows.device)
    keys = torch.cat([block.double() @ direction for block in rows.split(_BLOCK)])
    return torch.argsort(keys, stable=True)


def _initial(rows: torch.Tensor, k: int, restarts: int, seed: int) -> torch.Tensor:
    """k-means++ on the cosine distance, (restarts, k, D)."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(len(rows), (restarts,), generator=generator)
    chosen = [rows[first.to(rows.device)]]
    distance = torch.full((restarts, len(rows)), float("inf"), device=rows.device)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (1 - chosen[-1] @ rows.T).clamp_(min=0))
        cumulative = distance.double().cumsum(dim=1)
        draw = torch.rand(restarts, 1, generator=generator, dtype=torch.float64).to(rows.device)
        index = torch.searchsorted(cumulative, draw * cumulative[:, -1:]).clamp_(max=len(rows) - 1)
        chosen.append(rows[index.squeeze(1)])
    return torch.stack(chosen, dim=1)


def _assign(
    rows: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One assignment step of all restarts.

    Returns:
        sums (R, k, D), counts (R, k), objective (R,), worst row (R,), labels (N, R).
    """
    restarts, k, dim = centroids.shape
    flat = centroids.reshape(restarts * k, dim)
    sums = torch.zeros_like(flat)
    counts = rows.new_zeros(restarts * k)
    total = rows.new_zeros(restarts, dtype=torch.float64)
    worst_value = rows.new_full((restarts,), float("inf"))
    worst = torch.zeros(restarts, dtype=torch.long, device=rows.device)
    labels = []
    start = 0
    for block in rows.split(_BLOCK):
        similarity = (block @ flat.T).reshape(len(block), restarts, k)
        value, label = similarity.max(dim=2)
        member = (
            torch.zeros_like(similarity)
            .scatter_(2, label.unsqueeze(2), 1.0)
            .reshape(len(block), restarts * k)
        )
        sums += member.T @ block
        counts += member.sum(dim=0)
        total += value.sum(dim=0, dtype=torch.float64)
        low, where = value.min(dim=0)
        worst = torch.where(low < worst_value, where + start, worst)
        worst_value = torch.minimum(worst_value, low)
        labels.append(label)
        start += len(block)
    return (
        sums.reshape(restarts, k, dim),
        counts.reshape(restarts, k),
        total / len(rows),
        worst,
        torch.cat(labels),
    )


def _updated(
    rows: torch.Tensor, centroids: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor, worst: torch.Tensor
) -> torch.Tensor:
    new = torch.nn.functional.normalize(sums, dim=2)
    # An empty cluster restarts at the row that its run serves worst.
    new = torch.where((counts == 0).unsqueeze(2), rows[worst].unsqueeze(1), new)
    # Sums that cancel out leave no direction: keep the old one.
    return torch.where(new.norm(dim=2, keepdim=True) < 0.5, centroids, new)
