"""Candidates for the recipe that did not win, so that the library does not have them; their rows can be repeated.

Each changes one thing in how :class:`Builder` makes a tree. The nets they give are trained and tested here only:
a file or an export of one would describe the tree without the change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from sigmab_plugin import SigmaBNet
from sigmab_plugin.tree.build import Allocation, Builder
from sigmab_plugin.tree.calibration import Calibration
from sigmab_plugin.tree.modality import Modality, features
from sigmab_plugin.tree.net import Router
from sigmab_plugin.tree.plan import paths_at, prefixes
from sigmab_plugin.tree.prepare import Prepared
from sigmab_plugin.tree.segments import call


class MeanAndDeviation:
    """A modality that pools each channel to its mean and, after all the means, its standard deviation.

    Channels are still chosen by their means: these are the first C columns.
    """

    def __init__(self, kind: Modality) -> None:
        self.name = kind.name
        self.take, self.size, self.join, self.channel_dim = kind.take, kind.size, kind.join, kind.channel_dim
        self._mean = kind.pool

    def pool(self, frontier: Any) -> torch.Tensor:
        x = features(frontier).float()
        mean, square = (self._mean(_with_features(frontier, value)) for value in (x, x * x))
        deviation = (square - mean * mean).clamp_min(1e-6).sqrt()  # a root has no gradient at zero
        return torch.cat([mean, deviation], dim=1)


def _with_features(frontier: Any, value: torch.Tensor) -> Any:
    return (value, *frontier[1:]) if isinstance(frontier, (tuple, list)) else value


class PooledDeviation(Builder):
    """Routers see the mean and the standard deviation of each channel; of a single vector there is none."""

    def __init__(self, prepared: Prepared, calibration: Calibration) -> None:
        pooled = tuple(
            kind if kind.name == "vectors" else MeanAndDeviation(kind) for kind in prepared.modalities
        )
        super().__init__(dataclasses.replace(prepared, modalities=pooled), calibration)

    def _new_router(self, path: str) -> Router:
        router = super()._new_router(path)
        if not isinstance(self.prepared.modalities[len(prefixes(path))], MeanAndDeviation):
            return router
        old = router.projection.linear
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            new = nn.Linear(2 * old.in_features, old.out_features)
        router.projection.linear = new.to(old.weight)
        return router

    def net(self) -> SigmaBNet:
        net = super().net()
        net.modalities = self.prepared.modalities
        return net


class TrainedProjection(Builder):
    """Latents are the directions in which a node's feature tells most of the dense network's logits.

    Ridge regression of the logits on the pooled feature over the node's calibration samples, then the
    ``projection_dim`` principal directions of what it predicts. No labels.
    """

    def _new_router(self, path: str) -> Router:
        router = super()._new_router(path)
        level = len(prefixes(path))
        pooled, logits = self._observed(level, paths_at(level).index(path))
        linear = router.projection.linear
        weight, centre = _directions(pooled.double(), logits.double(), linear.out_features)
        linear.weight.data.copy_(weight)
        linear.bias.data.copy_(-weight @ centre)
        return router

    def _observed(self, level: int, node: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features (n, C) and dense logits (n, classes) of the samples that reach one node."""
        segments, descend = self.prepared.segments, self._descend(level)
        kind = self.prepared.modalities[level]
        pooled, logits = [], []
        for inputs in self.calibration.batches():
            frontier = value = call(segments.backbone, inputs)
            for module in segments.tail:
                value = call(module, value)
            for number, rows, own in descend(frontier):
                if number == node:
                    pooled.append(kind.pool(own))
                    logits.append(value[rows])
        return torch.cat(pooled), torch.cat(logits)


def _directions(x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (count, C) and centre (C,); rows of zeros where there are fewer directions than ``count``."""
    centre = x.mean(0)
    x, y = x - centre, y - y.mean(0)
    gram = x.T @ x
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    slopes = torch.linalg.solve(gram, x.T @ y)
    axes = torch.linalg.svd(x @ slopes, full_matrices=False).Vh[:count]
    weight = x.new_zeros(count, x.shape[1])
    weight[: len(axes)] = (slopes @ axes.T).T
    return weight, centre


class SharedByLevel(Builder):
    """Half of the default's shared channels at the first level, one and a half times at the second, so on."""

    #: kappa of each level, outermost first.
    ratios: tuple[float, ...] = (0.25, 0.75)

    def _split(self, level: int, *args: Any) -> Iterator[Allocation]:
        whole = self.config
        self.config = whole.replace(shared_ratio=self.ratios[level])
        yield from super()._split(level, *args)
        self.config = whole


class SharedByLevelReversed(SharedByLevel):
    ratios = (0.75, 0.25)


BUILDERS: dict[str, type[Builder]] = {
    "pooled-deviation": PooledDeviation,
    "trained-projection": TrainedProjection,
    "shared-0.25-0.75": SharedByLevel,
    "shared-0.75-0.25": SharedByLevelReversed,
}


def build_variant(name: str, prepared: Prepared, calibration_data: Iterable[Any]) -> SigmaBNet:
    """The tree that the builder called ``name`` makes."""
    builder = BUILDERS[name](prepared, Calibration(calibration_data, prepared.example))
    for _ in builder.run():
        pass
    return builder.net()
