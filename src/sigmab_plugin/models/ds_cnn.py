"""DS-CNN for keyword spotting, as in MLPerf Tiny (arXiv 1711.07128, arXiv 2106.07597)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from ._tiny import Size, check_positive, load_renamed, normalised, same_conv, same_size, separable_block


class DSCNN(nn.Module):
    """Stem 10x4 / stride 2, then separable blocks at one resolution: (B, 1, 49, 10) -> (B, classes).

    The pooling window is the reference's: 24 of the 25 rows that a 49-frame input gives, so the last
    row is read by no weight of the classifier.

    Args:
        num_classes: classes of the benchmark are 12 words.
        width: channels of every layer.
        blocks: separable blocks, named ``block1`` ... .
        input_size: frames and coefficients; "same" padding depends on it.
        dropout: rates after the stem and before the classifier; the reference trains with (0.2, 0.4).
    """

    def __init__(
        self,
        num_classes: int = 12,
        *,
        width: int = 64,
        blocks: int = 4,
        input_size: Size = (49, 10),
        dropout: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, width=width, blocks=blocks)
        size = same_size(input_size, 2)
        stem = normalised("", same_conv(1, width, (10, 4), size=input_size, stride=2), width)
        self.stem = nn.Sequential(OrderedDict([*stem, ("drop", nn.Dropout(dropout[0]))]))
        self.block_names = tuple(f"block{index}" for index in range(1, blocks + 1))
        for name in self.block_names:
            self.add_module(name, separable_block(width, width, size=size))
        self.pool = nn.AvgPool2d((max(input_size[0] // 2, 1), size[1]))
        self.flatten = nn.Flatten()
        self.drop = nn.Dropout(dropout[1])
        self.fc = nn.Linear(width, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        frontier = self.stem(features)
        for name in self.block_names:
            frontier = getattr(self, name)(frontier)
        logits: torch.Tensor = self.fc(self.drop(self.flatten(self.pool(frontier))))
        return logits


def load_mlperf_ds_cnn(path: str | Path) -> tuple[DSCNN, dict[str, str]]:
    """MLPerf Tiny's DS-CNN from a safetensors file, in eval mode, with the file's metadata.

    Raises:
        FormatError: the file does not hold this network.
    """
    model = DSCNN()
    names = {"conv1": "stem.conv", "bn1": "stem.bn", "fc": "fc"}
    for index, block in enumerate(model.block_names, start=1):
        for short, long in (("dw", "dw_conv"), ("bnd", "dw_bn"), ("pw", "pw_conv"), ("bnp", "pw_bn")):
            names[f"{short}{index}"] = f"{block}.{long}"
    metadata = load_renamed(model, path, names)
    return model.eval(), metadata
