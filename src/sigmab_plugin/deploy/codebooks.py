"""Weights as indices into one codebook of b x b blocks (LegoNet): written per node, expanded at its load.

A region then holds the tensor ``codebook`` (K, b*b), per packed tensor ``NAME.index`` (bit-packed, least
significant bit first, blocks row by row) and perhaps ``NAME.scale`` (one factor, or one per row), and what
stays dense. ``node.extra["codebook"]`` says what the expanded region looks like, so runtimes see ordinary
weights. Reading needs NumPy only.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, FormatError, ModelError
from .backends.base import views
from .manifest import Node, codebook_region, round_up
from .storage import fresh_memory
from .writing import RawTensor, pack, raw

if TYPE_CHECKING:
    from ..techniques.legonet import PackedModel
    from .nodes import NodeSource

_log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

#: A folded normalisation rounds once more than the packed weight did.
_TOLERANCE = 1e-6
_STRIP = 1 << 18


def encode(
    source: NodeSource, tensors: Sequence[RawTensor], packed: PackedModel
) -> tuple[list[RawTensor], dict[str, Any]]:
    """What to store instead of ``tensors``, and the description for ``extra["codebook"]``.

    A tensor is stored as indices where it is the packed one, or that one with its rows scaled: batch
    normalisation that was folded into a convolution scales rows.

    Raises:
        ModelError: none of the node's tensors is a packed one.
    """
    codebook = packed.codebook.detach().cpu().float().numpy()
    side = packed.config.block_size
    stored: list[RawTensor] = [raw("codebook", codebook)]
    names: list[str] = []
    for name, dtype, shape, data in tensors:
        entry = _packed_entry(source, name, packed)
        coded: list[RawTensor] | None = None
        if entry is not None and dtype == "float32" and shape == entry.shape:
            blocks = codebook[entry.indices(side, len(codebook)).numpy()]
            plain = _matrix(blocks, shape, side)
            known = None if entry.scale is None else entry.scale.detach().cpu().numpy()
            scale = _scale(np.frombuffer(data, np.float32).reshape(plain.shape), plain, known)
            if scale is not None:
                coded = [raw(f"{name}.index", entry.index.detach().cpu().numpy())]
                coded += [raw(f"{name}.scale", scale)] if scale.size else []
        if coded is None:
            stored.append((name, dtype, shape, data))
            if entry is not None:
                _log.info("%s: %r is not the packed weight and stays dense", source, name)
            continue
        stored.extend(coded)
        names.append(name)
    if not names:
        raise ModelError(
            f"{source}: none of its weights is the packed one; export the expanded network "
            "(expand_into(packed, net)), not the one that was packed"
        )
    data, _, entries = pack(tensors)
    layout = [[t.name, t.dtype, list(t.shape), t.offset, t.nbytes] for t in entries]
    return stored, {"block_size": side, "nbytes": len(data), "tensors": layout, "packed": names}


def _packed_entry(source: NodeSource, name: str, packed: PackedModel) -> Any:
    """The packed tensor that a node's tensor is, by its name in the whole network."""
    part, _, rest = name.partition(".")
    inside = "backbone" if source.role == "backbone" else f"specializers.{source.key}"
    home = {"body": inside, "router": f"routers.{source.key}", "head": f"heads.{source.key}"}.get(part)
    full = f"{home}.{rest}"
    return packed.tensors.get(packed.aliases.get(full, full))


def _scale(wanted: Array, plain: Array, known: Array | None) -> Array | None:
    """Factors of the rows with which ``plain`` is ``wanted``; empty: none needed; None: there are none."""
    if known is None and np.array_equal(wanted, plain):
        return np.zeros(0, np.float32)
    if known is not None and np.array_equal(wanted, plain * known.reshape(-1, 1)):
        return known.astype(np.float32)
    square = np.square(plain, dtype=np.float64).sum(1)
    product = (wanted.astype(np.float64) * plain).sum(1)
    rows = np.divide(product, square, out=np.zeros_like(product), where=square > 0).astype(np.float32)
    largest = np.abs(wanted).max(initial=0.0)
    return rows if np.abs(plain * rows[:, None] - wanted).max(initial=0.0) <= _TOLERANCE * largest else None


def _matrix(blocks: Array, shape: Sequence[int], side: int) -> Array:
    """Blocks (n, b*b) as the matrix (shape[0], everything else)."""
    rows = int(shape[0])
    columns = int(np.prod(shape[1:], dtype=np.int64))
    across = round_up(columns, side) // side
    grid = blocks.reshape(-1, across, side, side).transpose(0, 2, 1, 3)
    matrix: Array = grid.reshape(-1, across * side)[:rows, :columns]
    return matrix


def expanded_node(node: Node) -> Node:
    """``node`` as a runtime sees it: its region is the expanded one.

    Raises:
        FormatError: the description is incomplete.
    """
    nbytes, tensors = codebook_region(node)
    return replace(node, weights=replace(node.weights, nbytes=nbytes, used=nbytes, tensors=tensors))


def expand(node: Node, target: Node, region: mmap.mmap) -> mmap.mmap:
    """The region of ``target`` (see :func:`expanded_node`) from the bytes of ``node``'s.

    Raises:
        FormatError: an index lies past the end of the codebook, or a tensor is missing.
    """
    stored = {entry.name: array for entry, array in views(node, region)}
    described = node.extra["codebook"]
    side, packed = int(described["block_size"]), frozenset(described["packed"])
    memory = fresh_memory(target.weights.nbytes)
    try:
        codebook = stored["codebook"]
        for entry, array in views(target, memory):
            if entry.name not in packed:
                array[...] = stored[entry.name]
                continue
            scale = stored.get(f"{entry.name}.scale")
            matrix = array.reshape(entry.shape[0], -1)
            _expand_into(matrix, stored[f"{entry.name}.index"], codebook, side)
            if scale is not None:
                np.multiply(matrix, scale.reshape(-1, 1), out=matrix)
    except (KeyError, IndexError, ValueError) as error:
        raise FormatError(
            f"node {node.path or 'root'!r}: its codes do not fit its codebook ({error}): export again"
        ) from error
    return memory


def _expand_into(matrix: Array, index: Array, codebook: Array, side: int) -> None:
    """Fill ``matrix`` strip by strip, so that little is in memory twice."""
    across = round_up(matrix.shape[1], side) // side
    down = round_up(matrix.shape[0], side) // side
    bits = (len(codebook) - 1).bit_length()
    numbers = _unpack(index, down * across, bits)
    strip = max(1, _STRIP // (across * side * side))
    for first in range(0, down, strip):
        part = codebook[numbers[first * across : (first + strip) * across]]
        rows = matrix[first * side : (first + strip) * side]
        rows[...] = _matrix(part, (len(rows), matrix.shape[1]), side)


def _unpack(packed: Array, count: int, bits: int) -> Array:
    """``count`` integers of ``bits`` bits, least significant bit first."""
    if len(packed) * 8 < count * bits:
        raise ValueError(f"{len(packed)} bytes hold fewer than {count} indices of {bits} bits")
    if bits == 0:
        return np.zeros(count, np.int64)
    if bits in (8, 16):
        return packed.view(f"<u{bits // 8}")[:count]
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    numbers: Array = np.zeros(count, np.int32)
    for bit in range(bits):
        numbers |= stream[:, bit].astype(np.int32) << bit
    return numbers


def check(net: Any, packed: Any) -> PackedModel:
    """The packed weights to export ``net`` with: those given, or those that packing left with it.

    Raises:
        ConfigError: neither, or something else.
    """
    from ..techniques.legonet import PackedModel

    packed = packed if packed is not None else getattr(net, "legonet", None)
    if packed is None:
        raise ConfigError(
            "precision='legonet' needs packed weights: give codebook=, a PackedModel of "
            "sigmab_plugin.techniques.legonet"
        )
    if not isinstance(packed, PackedModel):
        raise ConfigError(
            f"codebook must be a PackedModel, as sigmab_plugin.techniques.legonet.read_packed(file) returns it; "
            f"got {type(packed).__name__}"
        )
    return packed
