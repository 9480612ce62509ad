"""Checkpoints of a training run: one safetensors file each, written atomically, never unpickled.

``last.safetensors`` holds all that a resumed run needs: tensors ``model.*`` and ``optimizer.<index>.<key>``,
and the scalars (epoch, records, recipe, seed) as JSON in the file's metadata. ``best.safetensors`` holds the
weights alone, under the network's own names.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import FormatError

VERSION = 1
_METADATA = "sigmab"
LAST, BEST = "last.safetensors", "best.safetensors"


def save_training(
    path: str | os.PathLike[str], net: nn.Module, optimizer: torch.optim.Optimizer, scalars: Mapping[str, Any]
) -> None:
    """Write weights, optimiser state and ``scalars`` (JSON types) to ``path``, replacing it atomically."""
    tensors = {f"model.{name}": value for name, value in net.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain.setdefault(str(index), {})[key] = value
    _write(path, tensors, {"kind": "training", "scalars": dict(scalars), "optimizer": plain})


def load_training(
    path: str | os.PathLike[str], net: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what :func:`save_training` wrote, all or nothing, and return the scalars.

    Raises:
        FormatError: truncated or altered file, a newer version, or another network's checkpoint (names the
            first tensor that does not fit).
    """
    tensors, header = _read(path, "training")
    weights = _weights(tensors, header)
    check_fit(path, net, weights)
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in header["optimizer"].items()}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    _check_optimizer(path, optimizer, state)
    net.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    scalars: dict[str, Any] = header["scalars"]
    return scalars


def read_scalars(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The scalars of a checkpoint, without reading its tensors.

    Raises:
        FormatError: as :func:`load_training`.
    """
    with _opened(path) as file:
        scalars: dict[str, Any] = _header(path, file.metadata(), None)["scalars"]
        return scalars


def save_weights(path: str | os.PathLike[str], net: nn.Module, scalars: Mapping[str, Any]) -> None:
    """Write the weights of ``net`` to ``path`` under their own names, replacing it atomically."""
    _write(path, net.state_dict(), {"kind": "weights", "scalars": dict(scalars)})


def load_weights(path: str | os.PathLike[str], net: nn.Module) -> dict[str, Any]:
    """Load a ``best`` or ``last`` checkpoint's weights into ``net``, all or nothing, and return the scalars.

    Raises:
        FormatError: as :func:`load_training`.
    """
    tensors, header = _read(path, None)
    tensors = _weights(tensors, header)
    check_fit(path, net, tensors)
    net.load_state_dict(tensors)
    scalars: dict[str, Any] = header["scalars"]
    return scalars


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The network's tensors of a ``best`` or ``last`` checkpoint, under its own names.

    Raises:
        FormatError: as :func:`load_training`.
    """
    return _weights(*_read(path, None))


def check_fit(path: str | os.PathLike[str], net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of another network.

    Raises:
        FormatError: naming the first tensor that is missing, unknown, or of another shape or type.
    """
    expected = net.state_dict()
    hint = "this is the checkpoint of another network; give the network it was made with, or another folder"
    for name, tensor in expected.items():
        if name not in weights:
            raise FormatError(f"{path} has no tensor {name!r}: {hint}")
        found = weights[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise FormatError(
                f"{path}: tensor {name!r} is {found.dtype} {tuple(found.shape)}, the network's is "
                f"{tensor.dtype} {tuple(tensor.shape)}: {hint}"
            )
    for name in weights:
        if name not in expected:
            raise FormatError(f"{path} has tensor {name!r}, which the network lacks: {hint}")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` under a temporary name in the same folder, flush it to disk, then rename."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _weights(tensors: dict[str, Tensor], header: Mapping[str, Any]) -> dict[str, Tensor]:
    if header["kind"] != "training":
        return tensors
    return {name[len("model.") :]: value for name, value in tensors.items() if name.startswith("model.")}


def _check_optimizer(
    path: str | os.PathLike[str], optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            fits = index < len(parameters) and (
                not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameters[index].shape
            )
            if not fits:
                raise FormatError(
                    f"{path}: optimiser state {key!r} of parameter {index} does not fit the network's trainable "
                    "parameters; unfreeze the same ones as when it was written, or start with resume=False"
                )


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
    path = Path(path)
    # Clones: tied tensors share storage, which the format refuses.
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    metadata = {_METADATA: json.dumps({"version": VERSION, **header}, sort_keys=True)}
    temporary = _temporary(path)
    try:
        save_file(plain, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}); an earlier file of that name is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _opened(path: str | os.PathLike[str]) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FormatError(f"there is no checkpoint {path}") from error
    except (SafetensorError, OSError, struct.error) as error:
        raise FormatError(
            f"{path} is truncated or not a safetensors file ({error}); delete it, or start with resume=False"
        ) from error


def _header(
    path: str | os.PathLike[str], metadata: Mapping[str, str] | None, kind: str | None
) -> dict[str, Any]:
    if not metadata or _METADATA not in metadata:
        raise FormatError(
            f"{path} is not a checkpoint of this package: its metadata has no {_METADATA!r} entry"
        )
    try:
        header: dict[str, Any] = json.loads(metadata[_METADATA])
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: the metadata is not JSON ({error}); the file was altered") from error
    if header.get("version") != VERSION:
        raise FormatError(
            f"{path} has checkpoint version {header.get('version')!r}, this release reads {VERSION}; "
            "upgrade sigmab-plugin"
        )
    if kind is not None and header.get("kind") != kind:
        raise FormatError(f"{path} holds {header.get('kind')}, expected {kind}")
    return header


def _read(path: str | os.PathLike[str], kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with _opened(path) as file:
        header = _header(path, file.metadata(), kind)
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (not a mapping)
