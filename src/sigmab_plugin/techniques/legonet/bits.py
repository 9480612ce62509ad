"""Integers in exactly as many bits as they need."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import FormatError

# A multiple of 8, so that every chunk but the last ends on a byte.
_CHUNK = 1 << 20


def bits_per_index(codebook_size: int) -> int:
    """ceil(log2 K): 0 for K = 1, 5 for K = 32, 6 for K = 33."""
    if codebook_size < 1:
        raise FormatError(f"a codebook has at least one entry; got {codebook_size}")
    return (codebook_size - 1).bit_length()


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` integers of ``bits`` bits take, rounded up once."""
    return -(-count * bits // 8)


def pack_bits(index: Tensor, bits: int) -> Tensor:
    """Pack ``index`` (n,), integers in [0, 2**bits), into a uint8 tensor, least significant bit first."""
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >> bits):
        raise FormatError(f"indices lie in [{int(index.min())}, {int(index.max())}]; {bits} bits hold less")
    if bits == 0 or index.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8)
    shifts = torch.arange(bits)
    weights = 1 << torch.arange(8)
    packed = []
    for chunk in index.to("cpu", torch.int64).split(_CHUNK):
        stream = (chunk[:, None] >> shifts & 1).reshape(-1)
        stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8))
        packed.append((stream.reshape(-1, 8) * weights).sum(1).to(torch.uint8))
    return torch.cat(packed)


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of :func:`pack_bits`: ``(count,)`` int64.

    Raises:
        FormatError: ``packed`` is not as long as ``count`` indices of ``bits`` bits need.
    """
    if packed.numel() != packed_bytes(count, bits):
        raise FormatError(
            f"{packed.numel()} bytes of packed indices, expected {packed_bytes(count, bits)} "
            f"for {count} indices of {bits} bits; the file is truncated or altered"
        )
    if bits == 0 or count == 0:
        return torch.zeros(count, dtype=torch.int64)
    shifts = torch.arange(bits)
    byte_shifts = torch.arange(8)
    index = []
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        first = start * bits // 8
        chunk = packed[first : first + packed_bytes(size, bits)].to(torch.int64)
        stream = (chunk[:, None] >> byte_shifts & 1).reshape(-1)[: size * bits]
        index.append((stream.reshape(size, bits) << shifts).sum(1))
    return torch.cat(index)
