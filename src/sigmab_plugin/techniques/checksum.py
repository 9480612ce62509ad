"""Checksum of one tensor in a file, so that a damaged file is refused instead of loaded."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def crc32(tensor: Tensor) -> int:
    """CRC-32 of the bytes of ``tensor``, wherever it is; its shape and dtype do not count."""
    data = tensor.detach().cpu().contiguous().flatten()
    return zlib.crc32(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
