"""One file for a packed model, read whole or in part.

A safetensors file with the tensors ``codebook``, ``index:<name>``, ``scale:<name>`` and
``dense:<name>``; its metadata hold a JSON header with the format's version, the configuration, shapes
and dtypes, and a CRC-32 per tensor, so that a partial read is checked as well.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import ConfigError, FormatError
from ..checksum import crc32
from .config import LegoNetConfig
from .packed import PackedModel, PackedTensor, expand_into

FORMAT = "legonet"
VERSION = 1


def save_packed(packed: PackedModel, path: str | os.PathLike[str]) -> int:
    """Write ``packed`` and return the size of the file in bytes. The file appears whole or not at all."""
    tensors = {"codebook": packed.codebook}
    for name, entry in packed.tensors.items():
        tensors[f"index:{name}"] = entry.index
        if entry.scale is not None:
            tensors[f"scale:{name}"] = entry.scale
    tensors.update({f"dense:{name}": tensor for name, tensor in packed.dense.items()})
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    header = json.dumps(
        {
            "version": VERSION,
            "config": packed.config.to_dict(),
            "tensors": {name: [entry.dtype, *entry.shape] for name, entry in packed.tensors.items()},
            "aliases": dict(packed.aliases),
            "crc32": {key: crc32(tensor) for key, tensor in tensors.items()},
        },
        separators=(",", ":"),
    )
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    metadata = {"format": FORMAT, "header": header, "crc32": str(zlib.crc32(header.encode()))}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)
    return path.stat().st_size


def read_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Read a whole file. Raises :class:`FormatError` where it is truncated, altered or too new."""
    with LazyPackedModel(path) as lazy:
        return lazy.read()


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the weights of the file, bit for bit those of :func:`expand_into`."""
    return expand_into(read_packed(path), model)


def expand_node(path: str | os.PathLike[str], prefix: str) -> dict[str, Tensor]:
    """State dict of the module called ``prefix``, reading only its part of the file.

    For example ``expand_node("net.safetensors", "specializers.0_1")`` when a path needs that branch.
    """
    with LazyPackedModel(path) as lazy:
        return lazy.expand(prefix)


class LazyPackedModel:
    """An open file whose tensors are read when asked for; the codebook is kept after its first use."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FormatError(f"no packed model at {self.path}")
        try:
            self._file = safe_open(self.path, framework="pt")
            self._handle = self._file.__enter__()
            metadata = self._handle.metadata() or {}
            self._keys = frozenset(self._handle.keys())
        except SafetensorError as error:
            raise FormatError(f"{self.path} is not a readable safetensors file: {error}") from error
        self._header = _header(self.path, metadata)
        self._codebook: Tensor | None = None
        try:
            self.config = LegoNetConfig.from_dict(self._header["config"])
            self._shapes: Mapping[str, list[Any]] = self._header["tensors"]
            self._aliases: Mapping[str, str] = self._header["aliases"]
            self._crc: Mapping[str, int] = self._header["crc32"]
        except (KeyError, ConfigError) as error:
            raise FormatError(f"{self.path}: header cannot be used: {error}") from error

    def __enter__(self) -> LazyPackedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, value, trace)

    @property
    def codebook(self) -> Tensor:
        """``(K, b*b)`` float32."""
        if self._codebook is None:
            self._codebook = self._tensor("codebook")
        return self._codebook

    def names(self) -> Iterator[str]:
        """Names of the whole state dict, tied ones included."""
        yield from self._shapes
        yield from (key.removeprefix("dense:") for key in self._keys if key.startswith("dense:"))
        yield from self._aliases

    def expand(self, prefix: str = "") -> dict[str, Tensor]:
        """State dict of the module called ``prefix``, names relative to it; ``""`` is the whole model.

        Raises:
            FormatError: no such module, or a checksum that does not match.
        """
        start = f"{prefix}." if prefix else ""
        state: dict[str, Tensor] = {}
        for name in self.names():
            if not name.startswith(start):
                continue
            stored = self._aliases.get(name, name)
            short = name.removeprefix(start)
            if stored in self._shapes:
                state[short] = self._packed_tensor(stored).expand(self.codebook, self.config.block_size)
            else:
                state[short] = self._tensor(f"dense:{stored}")
        if not state:
            raise FormatError(f"{self.path} holds no module called {prefix!r}")
        return state

    def read(self) -> PackedModel:
        """The whole file as a :class:`PackedModel`."""
        dense = [key.removeprefix("dense:") for key in self._keys if key.startswith("dense:")]
        return PackedModel(
            config=self.config,
            codebook=self.codebook,
            tensors={name: self._packed_tensor(name) for name in self._shapes},
            dense={name: self._tensor(f"dense:{name}") for name in sorted(dense)},
            aliases=dict(self._aliases),
        )

    def _packed_tensor(self, name: str) -> PackedTensor:
        dtype, *shape = self._shapes[name]
        scale = self._tensor(f"scale:{name}") if f"scale:{name}" in self._keys else None
        return PackedTensor(tuple(shape), dtype, self._tensor(f"index:{name}"), scale)

    def _tensor(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._handle.get_tensor(key)
        except SafetensorError as error:
            raise FormatError(f"{self.path}: tensor {key!r} cannot be read: {error}") from error
        if crc32(tensor) != self._crc.get(key):
            raise FormatError(f"{self.path}: tensor {key!r} does not match its checksum; copy the file again")
        return tensor


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT:
        raise FormatError(f"{path} is not a packed LegoNet model (format {metadata.get('format')!r})")
    text = metadata.get("header", "")
    if str(zlib.crc32(text.encode())) != metadata.get("crc32"):
        raise FormatError(f"{path}: the header does not match its checksum; copy the file again")
    header: dict[str, Any] = json.loads(text)
    if header.get("version") != VERSION:
        raise FormatError(
            f"{path} has format version {header.get('version')}, this release reads {VERSION}; "
            "install a newer sigmab-plugin"
        )
    return header
