"""Multiply-accumulates against those counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sigmab_plugin.counting import macs

TOKENS, WIDTH, HIDDEN = 10, 32, 64
X = torch.zeros(2, TOKENS, WIDTH)
PROJECTIONS, PRODUCTS = 4 * TOKENS * WIDTH * WIDTH, 2 * TOKENS * TOKENS * WIDTH


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize(
    ("module", "by_hand"),
    [
        (Products(), PRODUCTS),
        (Attention(), PROJECTIONS + PRODUCTS),
        (
            nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, batch_first=True),
            PROJECTIONS + PRODUCTS + 2 * TOKENS * WIDTH * HIDDEN,
        ),
        (nn.LSTM(WIDTH, 16, batch_first=True), TOKENS * 4 * 16 * (WIDTH + 16)),
        (nn.GRU(WIDTH, 16, batch_first=True), TOKENS * 3 * 16 * (WIDTH + 16)),
        (nn.Linear(WIDTH, 7), TOKENS * WIDTH * 7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_fused_layers_are_counted(module: nn.Module, by_hand: int) -> None:
    fast, fused = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    assert macs(module, X) == len(X) * by_hand
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == (fast, fused)
