"""The plan: what a restructured network is, as plain versioned data.

A network is the dense weights plus a plan. Everything here round-trips through JSON.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..channels import ChannelGroup
from ..config import SigmaBConfig
from ..errors import FormatError

FORMAT = "sigmab-plan"
VERSION = 1


def module_key(path: str) -> str:
    """Name of a node's module: ``"0/1"`` -> ``"0_1"``; the root's is ``"root"``."""
    return path.replace("/", "_") or "root"


def child(path: str, branch: int) -> str:
    return f"{path}/{branch}" if path else str(branch)


def paths_at(depth: int) -> tuple[str, ...]:
    """Paths of all nodes at ``depth``, left to right; depth 0 is the root ``""``."""
    paths = [""]
    for _ in range(depth):
        paths = [child(path, branch) for path in paths for branch in (0, 1)]
    return tuple(paths)


def prefixes(path: str) -> list[str]:
    """``"0/1"`` -> ``["0", "0/1"]``."""
    parts = path.split("/") if path else []
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


@dataclass(frozen=True)
class BranchPlan:
    """What one branch keeps.

    Attributes:
        keep: group name -> kept channels, ascending, for the groups that this branch's level owns;
            at a leaf those of its head, too.
        attributes: segment -> submodule -> attributes of layers that no layout describes.
    """

    keep: dict[str, tuple[int, ...]]
    attributes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitPlan:
    """How an inner node was split.

    Attributes:
        samples: calibration samples of each branch.
        objective: mean cosine similarity to the own centroid.
        shared: group name -> channels that both branches keep by the shared ratio.
        activation: group name -> mean activation given the branch, two rows of C.
    """

    samples: tuple[int, int]
    objective: float
    shared: dict[str, tuple[int, ...]]
    activation: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]


@dataclass(frozen=True)
class ShortenedLeaves:
    """Leaves that end inside their last specializer, in an auxiliary head (depth pruning).

    Attributes:
        cut: last layer that is kept, by its name inside the specializer; ``""``: none of it.
        head_widths: channels of the auxiliary head's stages.
        classes: outputs.
        frontiers: leaf path -> shape (1, C, H, W) of what enters its last specializer.
    """

    cut: str
    head_widths: tuple[int, ...]
    classes: int
    frontiers: dict[str, tuple[int, ...]]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ShortenedLeaves:
        return cls(
            cut=str(record["cut"]),
            head_widths=tuple(record["head_widths"]),
            classes=int(record["classes"]),
            frontiers={path: tuple(shape) for path, shape in record["frontiers"].items()},
        )


@dataclass(frozen=True)
class Plan:
    """A restructured network without its weights.

    Attributes:
        modalities: kind of data at each frontier: before every level, then before the head.
        features: pooled channels of each dense frontier.
        tensors: dense tensor name -> shape, per segment (backbone first); checked when loading.
        splits: inner node path -> its split. branches: branch path -> what it keeps.
        shortened: how the leaves were shortened afterwards, if they were.
    """

    config: SigmaBConfig
    modalities: tuple[str, ...]
    features: tuple[int, ...]
    groups: tuple[ChannelGroup, ...]
    tensors: tuple[dict[str, tuple[int, ...]], ...]
    branches: dict[str, BranchPlan]
    splits: dict[str, SplitPlan]
    shortened: ShortenedLeaves | None = None

    @property
    def depth(self) -> int:
        return len(self.modalities) - 1

    @property
    def leaves(self) -> tuple[str, ...]:
        return paths_at(self.depth)

    @property
    def inner_nodes(self) -> tuple[str, ...]:
        return tuple(path for depth in range(self.depth) for path in paths_at(depth))

    def kept(self, path: str) -> dict[str, torch.Tensor]:
        """Kept channels of every group decided on the way to ``path``."""
        keep: dict[str, torch.Tensor] = {}
        for prefix in prefixes(path):
            for name, channels in self.branches[prefix].keep.items():
                keep[name] = torch.tensor(channels, dtype=torch.long)
        return keep

    def feature_width(self, path: str) -> int:
        """Pooled channels of the frontier that leaves node ``path`` (the root: the backbone's)."""
        depth = len(prefixes(path))
        width = self.features[depth]
        keep = self.kept(path)
        for group in self.groups:
            if group.name in keep and depth in group.frontiers:
                _, channels = group.frontiers[depth].pairs(group.size)
                width -= int((~torch.isin(channels, keep[group.name])).sum())
        return width

    def to_dict(self) -> dict[str, Any]:
        record = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_dict(),
            "modalities": list(self.modalities),
            "features": list(self.features),
            "groups": [group.to_dict() for group in self.groups],
            "tensors": [{name: list(shape) for name, shape in part.items()} for part in self.tensors],
            "branches": {
                path: {"keep": {g: list(k) for g, k in b.keep.items()}, "attributes": b.attributes}
                for path, b in self.branches.items()
            },
            "splits": {path: dataclasses.asdict(split) for path, split in self.splits.items()},
        }
        if self.shortened is not None:
            record["shortened"] = dataclasses.asdict(self.shortened)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """Read a plan.

        Raises:
            FormatError: not a plan, a version from the future, or incomplete.
        """
        if record.get("format") != FORMAT:
            raise FormatError(f"not a SigmaB plan: format is {record.get('format')!r}, expected {FORMAT!r}")
        version = record.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise FormatError(
                f"the plan has version {version}, this package reads up to {VERSION}: upgrade sigmab-plugin"
            )
        try:
            return cls(
                config=SigmaBConfig.from_dict(record["config"]),
                modalities=tuple(record["modalities"]),
                features=tuple(record["features"]),
                groups=tuple(ChannelGroup.from_dict(group) for group in record["groups"]),
                tensors=tuple(
                    {name: tuple(shape) for name, shape in part.items()} for part in record["tensors"]
                ),
                branches={
                    path: BranchPlan({g: tuple(k) for g, k in b["keep"].items()}, b["attributes"])
                    for path, b in record["branches"].items()
                },
                splits={
                    path: SplitPlan(
                        samples=tuple(split["samples"]),
                        objective=split["objective"],
                        shared={g: tuple(c) for g, c in split["shared"].items()},
                        activation={g: (tuple(a[0]), tuple(a[1])) for g, a in split["activation"].items()},
                    )
                    for path, split in record["splits"].items()
                },
                shortened=ShortenedLeaves.from_dict(record["shortened"]) if "shortened" in record else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise FormatError(f"the plan is incomplete or altered: {error!r}") from error
