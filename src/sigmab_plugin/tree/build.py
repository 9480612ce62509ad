"""Phases 0 to 5 of arXiv 2606.09924: from a dense network and calibration data to a SigmaBNet."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..channels import ChannelGroup, slice_module
from ..errors import CalibrationError, ConfigError
from ..modes import evaluating
from ..tuning.distributed import all_gather_rows
from .allocation import split_channels, top_channels
from .calibration import Calibration
from .clustering import balanced_halves, spherical_kmeans
from .inner import InnerActivations
from .net import Router, SigmaBNet
from .plan import BranchPlan, Plan, SplitPlan, child, paths_at, prefixes
from .prepare import Prepared, channel_means
from .repair import Pair, fit_layers, sample_pairs
from .segments import call
from .statistics import collect_level
from .widths import warn_if_large

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allocation:
    """What one branch will keep, shown before it is used (``step(interactive=True)``).

    ``keep`` may be changed in place: for each of its names, the indices of the channels to keep, ascending, as
    a tensor, an array, a list or a tuple. Names can be neither added nor removed.
    """

    path: str
    level: str
    samples: int
    keep: dict[str, torch.Tensor]
    shared: dict[str, torch.Tensor]


#: Calibration samples of a node below which its two clusters are called uncertain.
_FEW = 16


def _node_seed(seed: int, path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class Builder:
    """Restructures level by level; one object, one use."""

    def __init__(self, prepared: Prepared, calibration: Calibration) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.calibration = calibration
        self.routers: dict[str, Router] = {}
        self.specializers: dict[str, nn.Module] = {}
        self.heads: dict[str, nn.Module] = {}
        self.branches: dict[str, BranchPlan] = {}
        self.splits: dict[str, SplitPlan] = {}
        self._objective: dict[str, float] = {}
        #: Node -> the samples that reach it, in the dense network and in the tree; only where layers are repaired.
        self._reaching: dict[str, Pair] = {}

    def run(self, progress: Callable[[str, int], None] | None = None) -> Iterator[Allocation]:
        """Yield every branch's allocation, then build it; afterwards :meth:`net` is ready.

        Between two allocations the caller has the model's modes and the gradient mode as they were.
        """
        segments = self.prepared.segments
        steps = self._steps(progress)
        while True:
            with evaluating(segments.backbone, *segments.tail):
                allocation = next(steps, None)
            if allocation is None:
                return
            yield allocation

    def _steps(self, progress: Callable[[str, int], None] | None) -> Iterator[Allocation]:
        for level in range(self.prepared.depth):
            yield from self._level(level, progress)
        yield from self._heads()

    def net(self) -> SigmaBNet:
        plan = Plan(
            config=self.config,
            modalities=tuple(kind.name for kind in self.prepared.modalities),
            features=self.prepared.features,
            groups=self.prepared.groups,
            tensors=self.prepared.shapes,
            branches=self.branches,
            splits=self.splits,
        )
        net = SigmaBNet(
            backbone=slice_module(self.prepared.segments.backbone, {}),
            routers=self.routers,
            specializers=self.specializers,
            heads=self.heads,
            plan=plan,
        )
        warn_if_large(self.prepared, net)
        return net

    def _kept(self, path: str) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor(channels, dtype=torch.long)
            for prefix in prefixes(path)
            for name, channels in self.branches[prefix].keep.items()
        }

    def _level(self, level: int, progress: Callable[[str, int], None] | None) -> Iterator[Allocation]:
        prepared = self.prepared
        paths = paths_at(level)
        for path in paths:
            self.routers[path] = self._new_router(path)
        name = prepared.segments.names[level]
        planes = [g for g in prepared.owned(level) if not g.is_output()]
        by_activation = self.config.inner_selection == "activation"
        inner = InnerActivations(prepared.segments.levels[level], level, planes if by_activation else [])
        with inner:
            latents, nodes, spool = collect_level(
                prepared.segments,
                self.calibration,
                prepared.modalities,
                level=level,
                descend=self._descend(level),
                embed=lambda number, pooled: self.routers[paths[number]].projection(pooled),
                inner=inner if by_activation else None,
                progress=(lambda done: progress(name, done)) if progress else None,
            )
        try:
            label = self._cluster(paths, latents, nodes)
            means = spool.mean_by(label, 2 * len(paths)).reshape(len(paths), 2, -1)
        finally:
            spool.close()
        sizes = torch.bincount(all_gather_rows(label), minlength=2 * len(paths)).reshape(len(paths), 2)
        for number, path in enumerate(paths):
            yield from self._split(level, path, means[number], sizes[number], inner.columns)
        if self.config.repair != "none":
            self._repair_level(level, count=len(label))

    def _repair_level(self, level: int, *, count: int) -> None:
        """Fit the specializers of one level; what they give then is what the next level clusters and routes."""
        prepared = self.prepared
        kind = prepared.modalities[level]
        if level == 0:
            self._reaching[""] = sample_pairs(
                prepared.segments, kind, self.calibration, limit=self.config.repair_samples, count=count
            )
        for path in paths_at(level):
            pair = self._reaching.pop(path, None)
            if pair is None:
                continue
            choice = self.routers[path](kind.pool(pair.own)).argmax(dim=1)
            for branch in (0, 1):
                index = (choice == branch).nonzero().flatten()
                below = child(path, branch)
                if len(index):
                    self._reaching[below] = self._fit(level, below, pair.take(kind, index))
                else:
                    _log.warning("branch %s is not repaired: none of repair_samples reaches it", below)

    def _fit(self, segment: int, path: str, pair: Pair) -> Pair:
        prepared = self.prepared
        own = self.heads[path] if segment == prepared.depth else self.specializers[path]
        return fit_layers(
            prepared.segments.tail[segment], own, prepared.slices(segment, self._kept(path)), pair
        )

    def _new_router(self, path: str) -> Router:
        prepared, config = self.prepared, self.config
        plan = Plan(config, (), prepared.features, prepared.groups, (), self.branches, {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_node_seed(config.seed, path))
            router = Router(
                plan.feature_width(path),
                config.projection_dim,
                dropout=config.projection_dropout,
                temperature=config.router_temperature,
            )
        return router.eval().to(prepared.segments.reference)

    def _descend(self, level: int) -> Callable[[Any], Iterator[tuple[int, torch.Tensor, Any]]]:
        """Route the backbone's output through the levels built so far, to the nodes at ``level``."""
        prepared = self.prepared
        numbers = {path: number for number, path in enumerate(paths_at(level))}

        def visit(path: str, frontier: Any, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, Any]]:
            depth = len(prefixes(path))
            if depth == level:
                yield numbers[path], rows, frontier
                return
            kind = prepared.modalities[depth]
            choice = self.routers[path](kind.pool(frontier)).argmax(dim=1)
            for branch in (0, 1):
                index = (choice == branch).nonzero().flatten()
                if len(index):
                    part = frontier if len(index) == len(choice) else kind.take(frontier, index)
                    below = child(path, branch)
                    yield from visit(below, call(self.specializers[below], part), rows[index])

        def descend(frontier: Any) -> Iterator[tuple[int, torch.Tensor, Any]]:
            size = prepared.modalities[0].size(frontier)
            device = (frontier[0] if isinstance(frontier, (tuple, list)) else frontier).device
            return visit("", frontier, torch.arange(size, device=device))

        return descend

    def _cluster(self, paths: Sequence[str], latents: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """Cluster each node's latents, set its router, and label samples 2 * node + branch."""
        label = torch.zeros(len(latents), dtype=torch.long)
        for number, path in enumerate(paths):
            rows = (nodes == number).nonzero().flatten()
            own = latents[rows]
            everyone = all_gather_rows(own)
            if len(everyone) < 2:
                raise CalibrationError(
                    f"node {path or 'root'!r} got {len(everyone)} calibration sample(s), and a split needs at least 2: "
                    "give more or more varied calibration data, or fewer levels"
                )
            if len(everyone) < _FEW:
                _log.warning(
                    "node %r is split by %d calibration samples: give some hundred for every leaf",
                    path or "root",
                    len(everyone),
                )
            result = spherical_kmeans(
                everyone,
                restarts=self.config.kmeans_restarts,
                iterations=self.config.kmeans_iterations,
                seed=_node_seed(self.config.seed, path),
            )
            if self.config.balanced_clusters:
                result = balanced_halves(everyone, result, iterations=self.config.kmeans_iterations)
                halves = torch.bincount(result.assignment, minlength=2).tolist()
                if abs(halves[0] - halves[1]) > 1:
                    _log.warning("node %r is split %d / %d: too many equal latents", path or "root", *halves)
            router = self.routers[path]
            router.linear.weight.copy_(result.centroids)
            router.linear.bias.copy_(torch.tensor([-result.threshold, 0.0]))
            self._objective[path] = result.objective
            choice = router.linear(own.to(router.linear.weight)).argmax(dim=1).cpu()
            label[rows] = 2 * number + choice
        return label

    def _split(
        self, level: int, path: str, means: torch.Tensor, sizes: torch.Tensor, inner: Mapping[str, slice]
    ) -> Iterator[Allocation]:
        prepared, config = self.prepared, self.config
        below = (child(path, 0), child(path, 1))
        keep: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        shared: dict[str, torch.Tensor] = {}
        activation: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
        for group in prepared.owned(level):
            widths = (prepared.width(group, below[0]), prepared.width(group, below[1]))
            if not group.is_output() and group.name not in inner:
                for branch in (0, 1):
                    keep[branch][group.name] = top_channels(
                        prepared.scores[group.name], widths[branch], group.partitions
                    )
                continue
            if group.is_output():
                values = channel_means(group, means, level + 1)
            else:
                values = means[:, prepared.features[level + 1] :][:, inner[group.name]]
            activation[group.name] = (_rounded(values[0]), _rounded(values[1]))
            if config.partition == "random":
                values = _random_like(values, _node_seed(config.seed, f"{path}:{group.name}"))
            common, kept = split_channels(
                values, widths, shared_ratio=config.shared_ratio, partitions=group.partitions
            )
            shared[group.name] = common
            keep[0][group.name], keep[1][group.name] = kept
        self.splits[path] = SplitPlan(
            samples=(int(sizes[0]), int(sizes[1])),
            objective=self._objective[path],
            shared={name: tuple(c.tolist()) for name, c in shared.items()},
            activation=activation,
        )
        for branch in (0, 1):
            allocation = Allocation(
                below[branch], prepared.segments.names[level], int(sizes[branch]), keep[branch], shared
            )
            lengths = {name: len(index) for name, index in keep[branch].items()}
            yield allocation
            self._commit(level, allocation, lengths)

    def _heads(self) -> Iterator[Allocation]:
        prepared = self.prepared
        for leaf in paths_at(prepared.depth):
            keep = {
                g.name: top_channels(prepared.scores[g.name], prepared.width(g, leaf), g.partitions)
                for g in prepared.owned(prepared.depth)
            }
            allocation = Allocation(leaf, prepared.segments.names[-1], self._samples(leaf), keep, {})
            lengths = {name: len(index) for name, index in keep.items()}
            yield allocation
            self._commit(prepared.depth, allocation, lengths)
            if leaf in self._reaching:
                self._fit(prepared.depth, leaf, self._reaching.pop(leaf))

    def _samples(self, leaf: str) -> int:
        parent, _, branch = leaf.rpartition("/")
        return self.splits[parent].samples[int(branch)]

    def _commit(self, segment: int, allocation: Allocation, lengths: Mapping[str, int]) -> None:
        """Build one branch's module from its (possibly edited) allocation."""
        path = allocation.path
        owned = {group.name: group for group in self.prepared.owned(segment)}
        _check_names(allocation.keep, owned, path)
        keep = {
            name: _checked(group, allocation.keep[name], lengths[name], path) for name, group in owned.items()
        }
        known = self.branches.get(path, BranchPlan({}))
        self.branches[path] = BranchPlan({**known.keep, **keep}, known.attributes)
        module, attributes = self.prepared.sliced(segment, self._kept(path))
        if attributes:
            merged = {**known.attributes, str(segment): attributes}
            self.branches[path] = BranchPlan({**known.keep, **keep}, merged)
        if segment == self.prepared.depth:
            self.heads[path] = module
        else:
            self.specializers[path] = module


def _check_names(keep: Mapping[str, Any], owned: Mapping[str, ChannelGroup], path: str) -> None:
    extra, missing = sorted(set(keep) - set(owned)), sorted(set(owned) - set(keep))
    if extra or missing:
        faults = (("cannot be chosen here", extra), ("missing", missing))
        raise ConfigError(
            f"branch {path}: the edited allocation must name exactly {', '.join(map(repr, owned)) or 'nothing'}; "
            + "; ".join(f"{what}: {', '.join(map(repr, names))}" for what, names in faults if names)
        )


def _checked(group: ChannelGroup, chosen: Any, length: int, path: str) -> tuple[int, ...]:
    """The chosen channels as plain data."""
    where = f"branch {path}, channels of {group.name!r}"
    try:
        index = torch.as_tensor(chosen)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where}: the edited allocation must hold indices; got {chosen!r:.80}") from error
    if index.ndim != 1 or len(index) == 0:
        raise ConfigError(f"{where}: the edited allocation must be a non-empty 1-D index tensor")
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        hint = " (for a mask, mask.nonzero().flatten())" if index.dtype == torch.bool else ""
        raise ConfigError(
            f"{where}: give integer indices{hint}, not {str(index.dtype).removeprefix('torch.')}"
        )
    index = index.to(torch.long)
    if bool((index[1:] <= index[:-1]).any()) or int(index[0]) < 0 or int(index[-1]) >= group.size:
        raise ConfigError(f"{where}: indices must ascend, without repeats, within 0..{group.size - 1}")
    if group.partitions > 1:
        blocks = index.reshape(group.partitions, -1) if len(index) % group.partitions == 0 else None
        step = group.size // group.partitions
        if blocks is None or not torch.equal(blocks % step, (blocks[:1] % step).expand_as(blocks)):
            raise ConfigError(
                f"{where}: every one of the {group.partitions} blocks must keep the same offsets"
            )
    if len(index) != length:
        _log.info("%s: %d channels instead of the %d planned", where, len(index), length)
    return tuple(index.tolist())


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(f"{v:.6g}") for v in values.tolist())


def _random_like(values: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(values.shape, generator=generator)


def restructure(
    prepared: Prepared,
    calibration_data: Iterable[Any] | None,
    *,
    progress: Callable[[str, int], None] | None = None,
) -> SigmaBNet:
    """Run all phases without a look at the allocations."""
    builder = Builder(prepared, Calibration(calibration_data, prepared.example))
    for _ in builder.run(progress):
        pass
    return builder.net()
