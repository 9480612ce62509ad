"""PointNet++ with single-scale grouping (Qi et al. 2017) for classification, on torch-geometric's modules."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, FormatError, MissingDependencyError
from .pointops import ball_query, farthest_point_sampling

try:
    from torch_geometric.nn import MLP, PointNetConv, global_max_pool
    from torch_geometric.nn.aggr import Aggregation
except ImportError as error:
    raise MissingDependencyError(
        "PointNet2 needs torch-geometric; install it with: pip install 'sigmab-plugin[pyg]'"
    ) from error


class PointInput(nn.Module):
    """Turns what callers have into ``(x, pos, batch)``: a torch-geometric batch, or ``pos`` with ``batch``.

    ``pos`` may be (N, 3) with ``batch`` (N,) or without (one cloud), or (B, N, 3). Features ``x`` come with a
    torch-geometric batch, or as columns of ``pos`` behind the first three; they may be None.
    """

    def forward(self, data: Any, batch: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
        if not isinstance(data, Tensor):
            index = data.batch
            if index is None:
                index = torch.zeros(len(data.pos), dtype=torch.long, device=data.pos.device)
            return data.x, data.pos, index
        if data.dim() == 3:
            if batch is not None:
                raise ConfigError("pos (B, N, 3) already separates the clouds; leave out batch")
            batch = torch.arange(len(data), device=data.device).repeat_interleave(data.shape[1])
            data = data.flatten(0, 1)
        if data.dim() != 2 or data.shape[1] < 3:
            raise ConfigError(f"points are (N, 3) with batch (N,), or (B, N, 3); got {tuple(data.shape)}")
        if batch is None:
            batch = torch.zeros(len(data), dtype=torch.long, device=data.device)
        features = data[:, 3:] if data.shape[1] > 3 else None
        return features, data[:, :3], batch


class TableMaxAggregation(Aggregation):
    """Maximum over edges that form a table: sorted by centre, the same number for each.

    Several times faster than a scattered maximum, which has to allow for any order.
    """

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        **kwargs: Any,
    ) -> Tensor:
        if dim_size is None:
            raise ConfigError("TableMaxAggregation needs dim_size, the number of centres")
        # Not amax: its backward shares gradients among ties, at several times the cost.
        return x.view(dim_size, -1, x.shape[-1]).max(dim=1).values


class SetAbstraction(nn.Module):
    """Samples centres, groups their neighbours, and encodes each group with a PointNet.

    ``(x, pos, batch)`` with x (sum N, C) or None -> ``(x', centres, batch')`` with x' (sum S, channels[-1]).

    Args:
        channels: of the shared MLP, its input (features + 3 relative coordinates) first.
        centres: centres per cloud, S.
        radius: of a group, in the unit of the coordinates.
        neighbours: points of a group at most.
        sampling: ``"fps"`` (farthest point sampling), or ``"prefix"``: the clouds' points already come in
            farthest-point order, so the first S points are that sample (:func:`order_points`).
        repeat: fill small groups by repeating a point, as the reference code does. The maximum is the
            same; BatchNorm then weighs every group alike, and groups form a table, which is faster.
        random_start: in training, start farthest point sampling at a random point.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        centres: int,
        radius: float,
        neighbours: int,
        sampling: str = "fps",
        repeat: bool = True,
        random_start: bool = False,
    ) -> None:
        super().__init__()
        if sampling not in ("fps", "prefix"):
            raise ConfigError(f"sampling must be 'fps' or 'prefix'; got {sampling!r}")
        self.centres = centres
        self.radius = radius
        self.neighbours = neighbours
        self.sampling = sampling
        self.repeat = repeat
        self.random_start = random_start
        self.conv = PointNetConv(
            local_nn=_mlp(channels), add_self_loops=False, aggr=TableMaxAggregation() if repeat else "max"
        )

    #: Methods without layers: a host that traces operations need not look inside (hundreds of steps per cloud).
    untraced = ("group",)

    def forward(self, x: Tensor | None, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centres, centre_batch, edges = self.group(pos, batch)
        return self.conv((x, None), (pos, centres), edges), centres, centre_batch

    @torch.no_grad()
    def group(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centres (sum S, 3), the cloud of each, and the edges from points to centres, (2, E)."""
        if self.sampling == "prefix":
            index = first_points(batch, self.centres)
        else:
            start = self.random_start and self.training
            index = farthest_point_sampling(pos, batch, self.centres, random_start=start)
        centres, centre_batch = pos[index], batch[index]
        edges = ball_query(
            pos,
            centres,
            batch,
            centre_batch,
            radius=self.radius,
            max_neighbours=self.neighbours,
            repeat=self.repeat,
        )
        return centres, centre_batch, edges


class GlobalSetAbstraction(nn.Module):
    """Encodes all points of a cloud as one group: x (sum N, C), pos (sum N, 3) -> (B, channels[-1])."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.mlp = _mlp(channels)

    def forward(self, x: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        pooled: Tensor = global_max_pool(self.mlp(torch.cat([x, pos], dim=1)), batch)
        return pooled


class PointNet2(nn.Module):
    """PointNet++ SSG classifier; 1 475 688 parameters at 40 classes.

    Levels for restructuring: ``["sa3", "fc1"]``, head ``"head"``.

    Args:
        num_classes: outputs.
        width: every channel count but those of input and output is multiplied by it.
        features: feature channels besides the coordinates (3 with normals).
        centres: centres per cloud of SA1 and SA2.
        neighbours: points of a group, likewise.
        radii: of the groups, likewise; the clouds lie in the unit sphere.
        dropout: before the last two linear layers.
        sampling, repeat, random_start: see :class:`SetAbstraction`.

    ``forward(data)`` takes a torch-geometric batch or points (B, N, 3); ``forward(pos, batch)`` takes
    points (sum N, 3) with the cloud of each. Both give logits (B, num_classes).
    """

    def __init__(
        self,
        num_classes: int = 40,
        *,
        width: float = 1.0,
        features: int = 0,
        centres: tuple[int, int] = (512, 128),
        neighbours: tuple[int, int] = (32, 64),
        radii: tuple[float, float] = (0.2, 0.4),
        dropout: float = 0.4,
        sampling: str = "fps",
        repeat: bool = True,
        random_start: bool = False,
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ConfigError(f"width must be more than 0; got {width!r}")

        def scaled(*channels: int) -> list[int]:
            return [max(1, round(c * width)) for c in channels]

        first, second, third = scaled(64, 64, 128), scaled(128, 128, 256), scaled(256, 512, 1024)
        wide, narrow = scaled(512, 256)
        options: dict[str, Any] = {"sampling": sampling, "repeat": repeat, "random_start": random_start}
        self.input = PointInput()
        self.sa1 = SetAbstraction(
            [features + 3, *first], centres=centres[0], radius=radii[0], neighbours=neighbours[0], **options
        )
        self.sa2 = SetAbstraction(
            [first[-1] + 3, *second], centres=centres[1], radius=radii[1], neighbours=neighbours[1], **options
        )
        self.sa3 = GlobalSetAbstraction([second[-1] + 3, *third])
        self.fc1 = nn.Sequential(_dense(third[-1], wide, dropout))
        self.head = nn.Sequential(
            _dense(wide, narrow, dropout) | OrderedDict(output=nn.Linear(narrow, num_classes))
        )

    def forward(self, data: Any, batch: Tensor | None = None) -> Tensor:
        x, pos, batch = self.input(data, batch)
        x, pos, batch = self.sa1(x, pos, batch)
        x, pos, batch = self.sa2(x, pos, batch)
        x = self.sa3(x, pos, batch)
        logits: Tensor = self.head(self.fc1(x))
        return logits


def _mlp(channels: Sequence[int]) -> MLP:
    return MLP(list(channels), plain_last=False)


def _dense(inputs: int, outputs: int, dropout: float) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        linear=nn.Linear(inputs, outputs),
        norm=nn.BatchNorm1d(outputs),
        act=nn.ReLU(),
        dropout=nn.Dropout(dropout),
    )


def first_points(batch: Tensor, count: int) -> Tensor:
    """Indices of the first ``min(count, N)`` points of each cloud, grouped by cloud."""
    sizes = torch.bincount(batch)
    position = torch.arange(len(batch), device=batch.device) - (sizes.cumsum(0) - sizes)[batch]
    return (position < count).nonzero().squeeze(1)


def order_points(points: Tensor, count: int, *, starts: Tensor | None = None, block: int = 512) -> Tensor:
    """The ``count`` farthest points of each cloud in the order of choice: (B, N, 3) -> (B, count, 3).

    A prefix of the result is the farthest point sample of that size, also of the result itself, so
    networks with ``sampling="prefix"`` need no sampling of their own. Done once per cloud.

    Args:
        points: (B, N, 3) with N >= count.
        starts: (B,) first point of each cloud; the first one by default.
        block: clouds worked on at once.
    """
    if not 1 <= count <= points.shape[1]:
        raise ConfigError(f"{count} points cannot be taken from clouds of {points.shape[1]}")
    parts = []
    for begin in range(0, len(points), block):
        clouds = points[begin : begin + block]
        if starts is not None:
            order = torch.arange(clouds.shape[1]).repeat(len(clouds), 1)
            order[:, 0] = starts[begin : begin + block]
            order.scatter_(1, starts[begin : begin + block, None], 0)
            clouds = clouds.gather(1, order[..., None].expand(-1, -1, 3))
        batch = torch.arange(len(clouds)).repeat_interleave(clouds.shape[1])
        index = farthest_point_sampling(clouds.flatten(0, 1), batch, count, backend="torch")
        parts.append(clouds.flatten(0, 1)[index].view(len(clouds), count, 3))
    return torch.cat(parts)


def convert_ssg_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the usual PyTorch SSG classifier (``pointnet2_cls_ssg``) for :class:`PointNet2`.

    ====================================  =====================================  ==========================
    there                                 here                                   change
    ====================================  =====================================  ==========================
    ``sa{1,2}.mlp_convs.{i}.*``           ``sa{1,2}.conv.local_nn.lins.{i}.*``   1x1 kernel -> matrix
    ``sa3.mlp_convs.{i}.*``               ``sa3.mlp.lins.{i}.*``                 1x1 kernel -> matrix
    ``sa*.mlp_bns.{i}.*``                 ``….norms.{i}.module.*``
    ``fc1.*``, ``bn1.*``                  ``fc1.linear.*``, ``fc1.norm.*``
    ``fc2.*``, ``bn2.*``                  ``head.linear.*``, ``head.norm.*``
    ``fc3.*``                             ``head.output.*``
    ====================================  =====================================  ==========================

    The first matrix of each SA takes [xyz, features] there and [features, xyz] here, so its columns are
    rolled. That network ends in log-softmax; this one gives logits.

    Raises:
        FormatError: a key that is not of that layout; it is named.
    """
    if "model_state_dict" in state:
        raise FormatError("this is a whole training checkpoint; pass its 'model_state_dict' entry")
    dense = {
        "fc1": "fc1.linear",
        "bn1": "fc1.norm",
        "fc2": "head.linear",
        "bn2": "head.norm",
        "fc3": "head.output",
    }
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.removeprefix("module.").split(".")
        if len(parts) == 2 and parts[0] in dense:
            result[f"{dense[parts[0]]}.{parts[1]}"] = value
        elif len(parts) == 4 and parts[0] in ("sa1", "sa2", "sa3") and parts[1] in ("mlp_convs", "mlp_bns"):
            block, kind, layer, name = parts
            mlp = f"{block}.mlp" if block == "sa3" else f"{block}.conv.local_nn"
            if kind == "mlp_bns":
                result[f"{mlp}.norms.{layer}.module.{name}"] = value
                continue
            if name == "weight":
                value = value.flatten(1)
                if layer == "0":
                    value = torch.cat([value[:, 3:], value[:, :3]], dim=1)
            result[f"{mlp}.lins.{layer}.{name}"] = value
        else:
            raise FormatError(f"{key!r} is not a key of the SSG classifier (sa1..sa3, fc1..fc3, bn1, bn2)")
    return result
