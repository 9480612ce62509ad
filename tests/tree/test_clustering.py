from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmab_plugin.errors import CalibrationError
from sigmab_plugin.tree.clustering import balanced_halves, spherical_kmeans


def _blobs(count: int, dim: int = 16, k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(k, dim)
    label = torch.arange(count) % k
    return centres[label] + 0.1 * torch.randn(count, dim), label


def test_finds_well_separated_clusters() -> None:
    rows, label = _blobs(500)
    result = spherical_kmeans(rows * torch.rand(500, 1))
    assert len(set((result.assignment ^ label).tolist())) == 1
    assert torch.allclose(result.centroids.norm(dim=1), torch.ones(2), atol=1e-6)


def test_best_partition_of_a_small_set() -> None:
    rows = torch.nn.functional.normalize(torch.randn(9, 3), dim=1)
    best = max(
        sum(float(rows[[i for i in range(9) if (side[i] == s)]].sum(0).norm()) for s in (0, 1)) / 9
        for side in itertools.product((0, 1), repeat=9)
        if 0 < sum(side) < 9
    )
    assert spherical_kmeans(rows, restarts=30).objective == pytest.approx(best, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 10_000))
def test_properties(count: int, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, generator=generator)
    try:
        result = spherical_kmeans(rows, seed=seed, restarts=4)
    except CalibrationError:
        unit = torch.nn.functional.normalize(rows, dim=1)
        assert torch.allclose(unit, unit[:1].expand_as(unit), atol=1e-5)
        return
    # Both sides are used, and each row is with its nearest centroid.
    assert set(result.assignment.tolist()) == {0, 1}
    similarity = torch.nn.functional.normalize(rows, dim=1) @ result.centroids.T
    chosen = similarity.gather(1, result.assignment[:, None]).squeeze(1)
    assert bool((chosen >= similarity.max(dim=1).values - 1e-5).all())
    # The order of the rows changes nothing.
    order = torch.randperm(count, generator=generator)
    shuffled = spherical_kmeans(rows[order], seed=seed, restarts=4)
    assert torch.equal(shuffled.assignment, result.assignment[order])


def test_same_seed_same_result_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = _blobs(300)
    first = spherical_kmeans(rows, seed=3)
    again = spherical_kmeans(rows, seed=3)
    assert torch.equal(first.centroids, again.centroids)
    monkeypatch.setattr("sigmab_plugin.tree.clustering._BLOCK", 64)
    blocked = spherical_kmeans(rows, seed=3)
    assert torch.equal(blocked.assignment, first.assignment)
    assert torch.allclose(blocked.centroids, first.centroids, atol=1e-5)


def test_one_outlier_is_a_cluster_of_its_own_rather_than_none() -> None:
    rows = torch.ones(50, 4) + 1e-4 * torch.randn(50, 4)
    rows[7] = torch.tensor([-1.0, 0, 0, 0])
    result = spherical_kmeans(rows)
    assert torch.bincount(result.assignment).tolist() in ([49, 1], [1, 49])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(1, 4), "at least 2 samples"),
        (torch.ones(8, 4), "same latent direction"),
        (torch.tensor([[1.0, 2], [float("nan"), 1]]), "sample 1 is not finite"),
    ],
)
def test_refuses(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        spherical_kmeans(rows)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 80), st.integers(2, 8), st.integers(0, 10_000))
def test_balanced_halves_are_halves(count: int, dim: int, seed: int) -> None:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    rows[: count // 5] += 3  # a cluster and the rest, unequal by themselves
    start = spherical_kmeans(rows)
    result = balanced_halves(rows, start)
    sizes = torch.bincount(result.assignment, minlength=2).tolist()
    assert sorted(sizes) == [count // 2, count - count // 2]
    bias = torch.tensor([-result.threshold, 0.0])
    assert torch.equal(torch.nn.functional.linear(rows, result.centroids, bias).argmax(1), result.assignment)
    near = torch.nn.functional.cosine_similarity(rows, result.centroids[result.assignment])
    assert result.objective == pytest.approx(float(near.mean()), abs=1e-5)


def test_balanced_halves_keep_equal_clusters_as_they_are() -> None:
    rows, _ = _blobs(400)
    start = spherical_kmeans(rows)
    result = balanced_halves(rows, start)
    assert torch.equal(result.assignment, start.assignment)


def test_rows_that_cannot_be_halved_keep_their_clusters() -> None:
    rows = torch.cat([torch.ones(9, 4), -torch.ones(2, 4)])
    start = spherical_kmeans(rows)
    assert torch.equal(balanced_halves(rows, start).assignment, start.assignment)
