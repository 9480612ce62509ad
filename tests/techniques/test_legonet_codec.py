"""LegoNet's parts: bit packing, blocks, k-means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sigmab_plugin.errors import CalibrationError, FormatError
from sigmab_plugin.techniques.legonet import bits_per_index, pack_bits, unpack_bits
from sigmab_plugin.techniques.legonet.blocks import block_grid, from_blocks, to_blocks
from sigmab_plugin.techniques.legonet.kmeans import assign, kmeans


@pytest.mark.parametrize(
    ("size", "bits"), [(1, 0), (2, 1), (3, 2), (16, 4), (17, 5), (32, 5), (33, 6), (2048, 11)]
)
def test_bits_per_index(size: int, bits: int) -> None:
    assert bits_per_index(size) == bits


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 70_000), data=st.data())
def test_packing_round_trips_for_every_codebook_size(size: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, size - 1), max_size=60))
    index = torch.tensor(values, dtype=torch.int64)
    bits = bits_per_index(size)
    packed = pack_bits(index, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-len(values) * bits // 8)
    assert torch.equal(unpack_bits(packed, len(values), bits), index)


def test_every_size_to_300_round_trips_at_its_largest_index() -> None:
    for size in range(1, 301):
        index = torch.arange(size).flip(0)
        bits = bits_per_index(size)
        assert torch.equal(unpack_bits(pack_bits(index, bits), size, bits), index)


def test_packing_crosses_its_chunks() -> None:
    index = torch.randint(2048, ((1 << 20) + 5,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_bits(pack_bits(index, 11), len(index), 11), index)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(FormatError, match="5 bits"):
        pack_bits(torch.tensor([32]), 5)
    with pytest.raises(FormatError, match="truncated"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 8, 5)


@settings(deadline=None, max_examples=100)
@given(shape=st.lists(st.integers(1, 9), min_size=2, max_size=5), block=st.integers(1, 5))
def test_blocks_round_trip_for_every_shape(shape: list[int], block: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    blocks = to_blocks(weight, block)
    down, across = block_grid(shape, block)
    assert blocks.shape == (down * across, block * block)
    assert torch.equal(from_blocks(blocks, shape, block), weight)
    # padding is zero: the blocks hold the weights and nothing else
    assert torch.isclose(blocks.double().square().sum(), weight.double().square().sum())


def test_block_layout_is_rows_of_the_flattened_matrix() -> None:
    weight = torch.arange(32.0).reshape(4, 2, 2, 2)
    blocks = to_blocks(weight, 4)
    assert torch.equal(blocks[0].reshape(4, 4), weight.reshape(4, 8)[:, :4])
    assert torch.equal(blocks[1].reshape(4, 4), weight.reshape(4, 8)[:, 4:])


def test_assignment_is_the_nearest_centroid() -> None:
    generator = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(3000, 16, generator=generator), torch.randn(37, 16, generator=generator)
    index, distance = assign(points, centroids)
    table = torch.cdist(points.double(), centroids.double()).square()
    assert torch.equal(index, table.argmin(1))
    assert torch.allclose(distance.double(), table.min(1).values, rtol=1e-4, atol=1e-4)


def test_kmeans_finds_separated_clusters_in_both_phases() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.eye(8)
    points = centers.repeat_interleave(400, 0) + 0.1 * torch.randn(3200, 8, generator=generator)
    for sample in (None, 640):
        found = kmeans(points, 8, sample=sample)
        assert found.distortion == pytest.approx(8 * 0.01, rel=0.1)
        by_center = found.index.reshape(8, 400)
        assert (by_center == by_center[:, :1]).all()
        assert len(by_center[:, 0].unique()) == 8


def test_kmeans_is_reproducible_and_its_seed_matters() -> None:
    points = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    first, again, other = kmeans(points, 16, seed=1), kmeans(points, 16, seed=1), kmeans(points, 16, seed=2)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.centroids, other.centroids)


def test_kmeans_fills_empty_clusters() -> None:
    # all points but three coincide: seeding repeats points, the repair must still reach all four places
    points = torch.zeros(500, 4)
    points[:3] = torch.eye(4)[:3] * 5
    found = kmeans(points, 4, iterations=10)
    assert found.distortion == pytest.approx(0, abs=1e-6)
    assert len(found.index.unique()) == 4


def test_kmeans_with_more_centroids_than_points() -> None:
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = kmeans(points, 9)
    assert found.centroids.shape == (9, 3)
    assert found.distortion == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        pytest.param(torch.zeros(0, 4), "N > 0", id="empty"),
        pytest.param(torch.zeros(4), "shape", id="one dimension"),
        pytest.param(torch.tensor([[1.0, float("nan")]]), "NaN", id="nan"),
    ],
)
def test_kmeans_refuses_bad_points(points: torch.Tensor, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        kmeans(points, 2)


def test_kmeans_is_no_worse_than_scikit_learns_mini_batch_kmeans() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    points = torch.randn(70_000, 16, generator=torch.Generator().manual_seed(0))
    ours = kmeans(points, 32)
    theirs = cluster.MiniBatchKMeans(32, random_state=0, n_init=1).fit(points.numpy())
    assert ours.distortion <= theirs.inertia_ / len(points)
