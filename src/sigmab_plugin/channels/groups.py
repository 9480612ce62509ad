"""Channel groups as plain data: no framework object survives in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: Indices kept of a tensor: {"layer3.0.conv1.weight": {dim: LongTensor}}
Slices = dict[str, dict[int, torch.Tensor]]


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that loses entries when channels of the group are dropped.

    ``positions[i]`` along ``dim`` belongs to channel ``channels[i]`` of the group. ``None`` stands
    for the identity 0..size-1, the usual case. Positions that no group names are always kept, for
    example the coordinates that a PointNetConv concatenates behind its features.
    """

    segment: int
    tensor: str
    dim: int
    role: str  # "out": the tensor produces the channels; "in": it reads them
    positions: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None

    def pairs(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions along ``dim`` and the group's channel at each, two tensors of equal length."""
        identity = torch.arange(size)
        return (
            identity if self.positions is None else torch.tensor(self.positions),
            identity if self.channels is None else torch.tensor(self.channels),
        )

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "segment": self.segment,
            "tensor": self.tensor,
            "dim": self.dim,
            "role": self.role,
        }
        if self.positions is not None:
            record["positions"] = list(self.positions)
        if self.channels is not None:
            record["channels"] = list(self.channels)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Member:
        values = dict(record)
        for key in ("positions", "channels"):
            if key in values:
                values[key] = tuple(values[key])
        return cls(**values)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be kept or dropped together, over all tensors that hold them.

    Attributes:
        name: qualified name of the layer whose output channels number the group.
        size: number of channels.
        owner: segment that decides: -1 the backbone, then one number per level, then the head.
        members: where the channels live.
        frontiers: frontier k (the input of segment k) -> the feature's positions and channels there.
        partitions: the channels are this many equal blocks, and every block keeps the same offsets
            (grouped convolutions, attention heads, group normalisation).
        complete: why the group must keep every channel; empty where it may be cut.
    """

    name: str
    size: int
    owner: int
    members: tuple[Member, ...]
    frontiers: dict[int, Member] = field(default_factory=dict)
    partitions: int = 1
    complete: str = ""

    @property
    def prunable(self) -> bool:
        return not self.complete

    def is_output(self) -> bool:
        """Whether the channels leave the segment that owns them."""
        return any(frontier > self.owner for frontier in self.frontiers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "owner": self.owner,
            "members": [member.to_dict() for member in self.members],
            "frontiers": {str(k): m.to_dict() for k, m in self.frontiers.items()},
            "partitions": self.partitions,
            "complete": self.complete,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ChannelGroup:
        values = dict(record)
        values["members"] = tuple(Member.from_dict(m) for m in values["members"])
        values["frontiers"] = {int(k): Member.from_dict(m) for k, m in values["frontiers"].items()}
        return cls(**values)


def slices_of(
    groups: Iterable[ChannelGroup],
    keep: Mapping[str, torch.Tensor],
    *,
    segment: int,
    shapes: Mapping[str, Sequence[int]],
) -> Slices:
    """Indices that remain in each tensor of ``segment`` when group ``g`` keeps channels ``keep[g]``.

    Args:
        keep: group name -> sorted channel indices; a group without an entry keeps everything.
        shapes: tensor name -> shape, for the tensors of the segment.
    """
    alive: dict[tuple[str, int], torch.Tensor] = {}
    for group in groups:
        if group.name not in keep:
            continue
        kept = torch.zeros(group.size, dtype=torch.bool)
        kept[keep[group.name]] = True
        for member in group.members:
            if member.segment != segment:
                continue
            mask = alive.setdefault(
                (member.tensor, member.dim), torch.ones(shapes[member.tensor][member.dim], dtype=torch.bool)
            )
            positions, channels = member.pairs(group.size)
            mask[positions] &= kept[channels]
    slices: Slices = {}
    for (tensor, dim), mask in alive.items():
        if not bool(mask.all()):
            slices.setdefault(tensor, {})[dim] = mask.nonzero().flatten()
    return slices
