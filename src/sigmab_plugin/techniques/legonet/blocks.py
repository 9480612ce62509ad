"""Weight tensors as b x b blocks, and back.

A tensor of shape ``(R, d1, d2, ...)`` is flattened to the matrix ``(R, d1*d2*...)`` (row = first
dimension: output channel of a convolution or linear layer, entry of an embedding, input channel of
a transposed convolution). The matrix is zero-padded at the bottom and on the right to multiples of b
and cut row by row into blocks; a block is stored as b*b numbers, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the flattened tensor."""
    return int(shape[0]), math.prod(shape[1:])


def block_grid(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """Number of blocks down and across, padding included."""
    rows, columns = matrix_shape(shape)
    return -(-rows // block_size), -(-columns // block_size)


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """``(blocks, b*b)`` float32 blocks of ``weight``, zero-padded."""
    rows, columns = matrix_shape(weight.shape)
    down, across = block_grid(weight.shape, block_size)
    matrix = weight.detach().reshape(rows, columns).to(torch.float32)
    padding = (0, across * block_size - columns, 0, down * block_size - rows)
    if any(padding):
        matrix = torch.nn.functional.pad(matrix, padding)
    grid = matrix.reshape(down, block_size, across, block_size).transpose(1, 2)
    return grid.reshape(down * across, block_size * block_size)


def from_blocks(blocks: Tensor, shape: Sequence[int], block_size: int) -> Tensor:
    """Inverse of :func:`to_blocks`: drops the padding, keeps dtype and gradient."""
    rows, columns = matrix_shape(shape)
    down, across = block_grid(shape, block_size)
    grid = blocks.reshape(down, across, block_size, block_size).transpose(1, 2)
    matrix = grid.reshape(down * block_size, across * block_size)[:rows, :columns]
    return matrix.reshape(tuple(shape))
