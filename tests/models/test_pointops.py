from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sigmab_plugin.errors import ConfigError
from sigmab_plugin.models.pointops import ball_query, farthest_point_sampling

SIZES = (40, 7, 64)


@pytest.fixture
def clouds() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(sum(SIZES), 3), torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))


def _greedy(pos: Tensor, count: int) -> list[int]:
    chosen = [0]
    while len(chosen) < min(count, len(pos)):
        distance = torch.stack([(pos - pos[i]).square().sum(1) for i in chosen]).amin(0)
        chosen.append(int(distance.argmax()))
    return chosen


@pytest.mark.parametrize("count", [1, 5, 20, 100])
def test_farthest_points_equal_the_definition(clouds: tuple[Tensor, Tensor], count: int) -> None:
    pos, batch = clouds
    expected: list[int] = []
    for cloud in range(len(SIZES)):
        members = (batch == cloud).nonzero().squeeze(1)
        expected += [int(members[i]) for i in _greedy(pos[members], count)]
    assert farthest_point_sampling(pos, batch, count, backend="torch").tolist() == expected


def test_random_start_is_seeded_and_inside_its_cloud(clouds: tuple[Tensor, Tensor]) -> None:
    pos, batch = clouds
    starts = set()
    for seed in range(20):
        options = {"random_start": True, "backend": "torch"}
        index = farthest_point_sampling(
            pos, batch, 3, generator=torch.Generator().manual_seed(seed), **options
        )
        again = farthest_point_sampling(
            pos, batch, 3, generator=torch.Generator().manual_seed(seed), **options
        )
        assert torch.equal(index, again)
        assert torch.equal(batch[index], torch.arange(3).repeat_interleave(3))
        starts.add(int(index[0]))
    assert len(starts) > 3


@pytest.mark.parametrize("limit", [3, 200])
def test_ball_query_equals_the_definition(clouds: tuple[Tensor, Tensor], limit: int) -> None:
    pos, batch = clouds
    centre = farthest_point_sampling(pos, batch, 6, backend="torch")
    edges = ball_query(
        pos, pos[centre], batch, batch[centre], radius=0.35, max_neighbours=limit, backend="torch"
    )
    expected = []
    for row, c in enumerate(centre.tolist()):
        near = ((pos - pos[c]).square().sum(1) <= 0.35**2) & (batch == batch[c])
        expected += [[point, row] for point in near.nonzero().squeeze(1).tolist()[:limit]]
    assert edges.t().tolist() == expected


def test_repeat_fills_a_table_with_the_first_neighbour(clouds: tuple[Tensor, Tensor]) -> None:
    pos, batch = clouds
    centre = farthest_point_sampling(pos, batch, 6, backend="torch")
    arguments = (pos, pos[centre], batch, batch[centre])
    ragged = ball_query(*arguments, radius=0.35, max_neighbours=8, backend="torch")
    table = ball_query(*arguments, radius=0.35, max_neighbours=8, repeat=True)
    assert torch.equal(table[1], torch.arange(len(centre)).repeat_interleave(8))
    for row in range(len(centre)):
        near = ragged[0, ragged[1] == row].tolist()
        assert table[0, table[1] == row].tolist() == near + [near[0]] * (8 - len(near))


def test_a_centre_without_neighbours_takes_the_nearest_point_in_a_table() -> None:
    pos = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    centres = torch.tensor([[0.7, 0.0, 0.0]])
    zero, one = torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert ball_query(pos, centres, zero, one, radius=0.1, max_neighbours=2).shape == (2, 0)
    table = ball_query(pos, centres, zero, one, radius=0.1, max_neighbours=2, repeat=True)
    assert table.tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    "call",
    [
        lambda p, b: farthest_point_sampling(p, b, 0),
        lambda p, b: farthest_point_sampling(p, b, 2, backend="cuda"),
        lambda p, b: farthest_point_sampling(p[:0], b[:0], 2),
        lambda p, b: farthest_point_sampling(p[:, :2], b, 2),
        lambda p, b: ball_query(p, p, b, b, radius=0.0, max_neighbours=2),
        lambda p, b: ball_query(p, p[:40], b, b[:40], radius=0.1, max_neighbours=2),
    ],
    ids=["count", "backend", "empty", "shape", "radius", "clouds"],
)
def test_bad_arguments_are_refused(clouds: tuple[Tensor, Tensor], call) -> None:
    with pytest.raises(ConfigError):
        call(*clouds)
