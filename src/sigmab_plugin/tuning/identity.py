"""Which run a checkpoint belongs to: its settings, and digests of what it started from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import FormatError
from . import checkpoint
from .recipe import TrainRecipe
from .seeding import loader_left_as_found, seed_epoch

logger = logging.getLogger(__name__)

#: Keys of the digests -> what a difference means.
_STARTED_FROM = {
    "initial_weights": "other weights",
    "teacher_weights": "another teacher",
    "first_samples": "other data",
}

_START_OVER = (
    "to start over give another folder (checkpoint_dir; --out on the command line), delete {} or pass "
    "resume=False"
)

#: Samples of a dataset whose digest stands for all of it.
_SAMPLES = 32


def started_from(
    net: nn.Module, teacher: nn.Module | None, loader: Any, *, seed: int
) -> dict[str, str | None]:
    """Digests of the weights before training, of the teacher's and of some training data; None: not known."""
    return {
        "initial_weights": weights_digest(net.state_dict()),
        "teacher_weights": None if teacher is None else weights_digest(teacher.state_dict()),
        "first_samples": _data_digest(loader, seed),
    }


def weights_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes; the same on every device and in every order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        _add(digest, state[name])
    return digest.hexdigest()


def check_identity(
    path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], net: nn.Module
) -> dict[str, Any]:
    """Refuse the checkpoint of another run; return the identity to go on under.

    Weights may also be those that the run itself left, its last or its best: a loop that hands over the same
    network until the run is complete goes on. What the checkpoint of an earlier release does not say is not
    compared. ``net`` is as it was given, not yet resumed.

    Raises:
        FormatError: naming what differs and what to do.
    """
    known = {key: value for key, value in expected.items() if key not in _STARTED_FROM}
    _check_settings(path, found, known)
    if "initial_weights" not in found:
        logger.info(
            "%s does not say which weights it started from (it is of an earlier release): going on", path
        )
    names = [
        key
        for key in _STARTED_FROM
        if found.get(key) is not None and expected.get(key) is not None and found[key] != expected[key]
    ]
    if "initial_weights" in names and _left_by_the_run(path, net, expected["initial_weights"]):
        names.remove("initial_weights")
    if names:
        what = " and ".join(_STARTED_FROM[key] for key in names)
        way = _START_OVER.format(path.parent)
        if names == ["initial_weights"]:
            way += f"; to go on with it all the same, load it into the network first: load_weights({str(path)!r}, net)"
        else:
            way += "; to go on with it, give what it was started with"
        raise FormatError(f"{path} belongs to a run that started with {what}; {way}")
    return {**known, **{key: found[key] for key in _STARTED_FROM if key in found}}


def _left_by_the_run(path: Path, net: nn.Module, digest: str) -> bool:
    """Whether the digest is of weights in the run's own files.

    Raises:
        FormatError: the checkpoint's tensors have other names, shapes or types than the network's.
    """
    last = checkpoint.read_weights(path)
    checkpoint.check_fit(path, net, last)
    best = path.with_name(checkpoint.BEST)
    if weights_digest(last) == digest:
        return True
    return best.exists() and weights_digest(checkpoint.read_weights(best)) == digest


def _check_settings(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if isinstance(found.get("recipe"), dict):  # options that are newer than the checkpoint had their defaults
        found = {**found, "recipe": {**TrainRecipe().to_dict(), **found["recipe"]}}
    for key, value in expected.items():
        if found.get(key) == value:
            continue
        if key == "recipe" and isinstance(found.get(key), dict):
            value = {**value, "epochs": found[key].get("epochs")}  # the run's own stand beside the recipe
            if found[key] == value:
                continue
            changed = [name for name in value if found[key].get(name) != value[name]]
            what = ", ".join(f"{name} {found[key].get(name)!r} -> {value[name]!r}" for name in changed)
        else:
            what = f"{key} {found.get(key)!r} -> {value!r}"
        raise FormatError(
            f"{path} belongs to a run with other settings ({what}); give them again; {_START_OVER.format(path.parent)}"
        )


def _data_digest(loader: Any, seed: int) -> str | None:
    """Of the first batch of a list, or of the first samples behind the package's own loader, not augmented.

    Any other loader would have to be started for it, which its workers and samplers may not take lightly.
    """
    from ..data import Loader

    digest = hashlib.sha256()
    if isinstance(loader, (list, tuple)):
        _add(digest, loader[0])
    elif isinstance(loader, Loader):
        with loader_left_as_found(loader):
            seed_epoch(loader, seed=seed, epoch=0)  # the samples of a dataset may be random
            _add(digest, loader.dataset.batch(range(min(_SAMPLES, len(loader.dataset)))))
    else:
        return None
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Add tensors and arrays, through tuples, lists, dictionaries and torch-geometric batches."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, np.ndarray):
        value = (
            torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind in "biufc" else value.tolist()
        )
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.layout == torch.strided:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, (str, int, float)):
        digest.update(repr(value).encode())
