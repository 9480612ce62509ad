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
    for part in _parts(loader):
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
    for generator in _generators(loader):
        generator.manual_seed(value)


@contextmanager
def loader_left_as_found(loader: Any) -> Iterator[None]:
    """Put back the generators and the epochs (``set_epoch``, ``epoch``) that a loader and its parts own."""
    states = [(generator, generator.get_state()) for generator in _generators(loader)]
    epochs = [
        (part, part.epoch)
        for part in _parts(loader)
        if callable(getattr(part, "set_epoch", None)) and isinstance(getattr(part, "epoch", None), int)
    ]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        for part, epoch in epochs:
            part.set_epoch(epoch)


def _parts(loader: Any) -> list[Any]:
    """The loader, its data set and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    parts = (loader, dataset, batch_sampler, sampler, getattr(batch_sampler, "sampler", None))
    return list({id(part): part for part in parts if part is not None}.values())


def _generators(loader: Any) -> list[torch.Generator]:
    owned = (getattr(part, "generator", None) for part in _parts(loader))
    return [generator for generator in owned if isinstance(generator, torch.Generator)]
