"""Writing a bundle: page-aligned weight regions, and a directory that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError
from .manifest import ALIGNMENT, FORMAT, MANIFEST_NAME, PAGE, FileEntry, Region, TensorEntry, round_up

#: A tensor to write: name, dtype name as in the manifest, shape, raw bytes.
RawTensor = tuple[str, str, tuple[int, ...], bytes]


def raw(name: str, array: np.ndarray[Any, Any]) -> RawTensor:
    return name, array.dtype.name, tuple(array.shape), np.ascontiguousarray(array).tobytes()


def pack(tensors: Sequence[RawTensor]) -> tuple[bytes, int, tuple[TensorEntry, ...]]:
    """Lay ``tensors`` out one after the other: the region's bytes, the part used, the entries."""
    buffer, entries = bytearray(), []
    for name, dtype, shape, data in tensors:
        buffer.extend(bytes(round_up(len(buffer), ALIGNMENT) - len(buffer)))
        entries.append(TensorEntry(name, dtype, shape, len(buffer), len(data)))
        buffer.extend(data)
    used = len(buffer)
    buffer.extend(bytes(round_up(used, PAGE) - used))
    return bytes(buffer), used, tuple(entries)


class BundleWriter:
    """Writes the files of one bundle into a directory that no reader sees yet.

    ``packed`` puts all regions into one file, each on its own pages, in the order of the calls.
    """

    def __init__(self, directory: Path, *, packed: bool) -> None:
        self.directory = directory
        self._packed = packed
        self._offset = 0

    def weights(self, stem: str, tensors: Sequence[RawTensor]) -> Region:
        data, used, entries = pack(tensors)
        name = "weights.bin" if self._packed else f"{stem}.weights"
        offset = self._offset if self._packed else 0
        with open(self.directory / name, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._offset += len(data)
        return Region(name, offset, len(data), used, hashlib.sha256(data).hexdigest(), entries)

    def file(self, name: str, data: bytes) -> FileEntry:
        with open(self.directory / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def write_manifest(directory: Path, body: dict[str, Any]) -> None:
    """One line per key, and per node: a plan holds thousands of channel numbers."""

    def text(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    lines = []
    for key, value in body.items():
        nodes = ",\n  ".join(text(node) for node in value) if key == "nodes" else ""
        lines.append(f"{text(key)}: [\n  {nodes}\n ]" if nodes else f"{text(key)}: {text(value)}")
    data = "{\n " + ",\n ".join(lines) + "\n}\n"
    BundleWriter(directory, packed=False).file(MANIFEST_NAME, data.encode())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_bundle(directory: Path) -> bool:
    """Whether a manifest says so, whole or of another version; other programs have a file of that name too."""
    try:
        body = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("type") == FORMAT


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside ``target`` that is renamed to it when the block ends well.

    A ``target`` that is a symbolic link stays one: what it points to is written.

    Raises:
        FormatError: ``target`` exists and ``overwrite`` is off, or it is no bundle (never deleted).
    """
    target = Path(os.path.realpath(target))
    if target.exists():
        empty = target.is_dir() and not any(target.iterdir())
        if not empty and not _is_bundle(target):
            raise FormatError(f"{target} exists and is not a bundle: choose another directory")
        if not empty and not overwrite:
            raise FormatError(
                f"{target} already holds a bundle: pass overwrite=True (--overwrite) to replace it"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old: Path | None = None
    try:
        yield work
        _sync_directory(work)
        os.chmod(work, 0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.rename(target, old)  # an empty directory may be replaced, and mkdtemp made one
        os.rename(work, target)
        _sync_directory(target.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        if old is not None and not target.exists():
            os.rename(old, target)
        elif old is not None:
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
        raise
