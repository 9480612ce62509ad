"""Random numbers as a function of (seed, epoch): what makes a resumed run equal to an uninterrupted one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Put Python's, NumPy's and torch's global generators back on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (users' data sets use it)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_epoch(loader: Any, *, seed: int, epoch: int, rank: int = 0) -> None:
    """Make the epoch's data order and augmentation depend on ``seed``, ``epoch`` and ``rank`` alone.

    ``set_epoch`` is called on the loader, its data set, its sampler and its batch sampler where they have
    it; a generator that the loader or sampler owns is seeded; so are the global ones, which the rest draws
    from. Distributed samplers seed themselves equally on all ranks.
    """
    value = int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)[0] >> 1)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002
    torch.manual_seed(value)
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None)
    parts = (loader, getattr(loader, "dataset", None), batch_sampler, sampler)
    inner = getattr(batch_sampler, "sampler", None)
    owners = {id(part): part for part in (*parts, inner) if part is not None}
    for part in owners.values():
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(value)
