"""Calibration batches of a data set, for the commands that compress."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from .options import seed_of


class Labelled:
    """``(inputs, targets)`` in batches on the device: this process's part of ``--samples`` in a seeded order.

    Attributes:
        samples: of all processes. order: indices of this process's samples.
    """

    def __init__(self, data: Any, args: argparse.Namespace, device: Any) -> None:
        import numpy as np

        from ..tuning.distributed import rank, world_size

        self.data, self.device = data, device
        self.batch_size: int = args.batch_size
        order = np.random.default_rng(seed_of(args)).permutation(len(data))
        chosen = order if args.samples is None else order[: args.samples]
        self.samples = len(chosen)
        self.order = chosen[rank() :: world_size()]

    def __iter__(self) -> Iterator[Any]:
        from ..tuning.batches import to_device

        for start in range(0, len(self.order), self.batch_size):
            inputs, targets = self.data.batch(self.order[start : start + self.batch_size])
            yield to_device(inputs, self.device), to_device(targets, self.device)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)


class Calibration(Labelled):
    """The inputs alone."""

    def __iter__(self) -> Iterator[Any]:
        for inputs, _ in super().__iter__():
            yield inputs
