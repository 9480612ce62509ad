"""Batches in an order that depends on nothing but (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .dataset import Dataset

Augment = Callable[[Any, torch.Generator], Any]


class Loader:
    """Re-iterable batches ``(inputs, labels)``: the same order and augmentation for the same (seed, epoch).

    Iterating again without :meth:`set_epoch` repeats the epoch, so calibration passes see the same samples.
    With ``world_size`` > 1 each rank gets its share of every epoch's order, all of one length.

    Args:
        batch_size: samples per step.
        shuffle: a new order each epoch (:meth:`set_epoch`).
        seed: of order and augmentation.
        augment: ``(inputs, generator) -> inputs`` on collated batches, see :mod:`sigmab_plugin.data.augment`.
        drop_last: leave out an incomplete last batch.
        rank, world_size: this process among several.

    Raises:
        ConfigError: an empty dataset, a batch size under 1, or a rank outside the world.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1; got {batch_size}")
        if len(dataset) == 0:
            raise ConfigError("the dataset is empty")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in 0..{world_size - 1}; got {rank}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.augment = augment
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and augmentation the next iteration gives."""
        self.epoch = epoch

    def _share(self) -> int:
        if self.drop_last:
            return len(self.dataset) // self.world_size
        return -(-len(self.dataset) // self.world_size)

    def __len__(self) -> int:
        share = self._share()
        return share // self.batch_size if self.drop_last else -(-share // self.batch_size)

    def order(self) -> np.ndarray:
        """Sample indices of this rank in the current epoch."""
        order = np.arange(len(self.dataset))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        share = self._share()
        # np.resize repeats from the start, so that every rank takes equally many steps.
        return np.resize(order, share * self.world_size)[self.rank :: self.world_size]

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = self.order()
        for step in range(len(self)):
            inputs, labels = self.dataset.batch(order[step * self.batch_size : (step + 1) * self.batch_size])  # type: ignore[arg-type]
            if self.augment is not None:
                entropy = np.random.SeedSequence((self.seed, self.epoch, self.rank, step)).generate_state(1)
                inputs = self.augment(inputs, torch.Generator().manual_seed(int(entropy[0])))
            yield inputs, labels
