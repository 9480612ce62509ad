"""MobileNetV1 for Visual Wake Words, as in MLPerf Tiny (arXiv 1704.04861, arXiv 2106.07597)."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from ._tiny import Size, check_positive, load_renamed, normalised, same_conv, same_size, separable_block

#: (output channels at width 1, stride) of the thirteen separable blocks.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """Stem 3x3 / stride 2, thirteen separable blocks, average pool: (B, 3, 96, 96) -> (B, classes).

    Convolutions carry biases besides BatchNorm, as the reference's do.

    Args:
        num_classes: the benchmark has two: no person, person.
        width_multiplier: share of the full network's channels.
        input_size: height and width; "same" padding depends on it.
    """

    def __init__(
        self, num_classes: int = 2, *, width_multiplier: float = 0.25, input_size: Size = (96, 96)
    ) -> None:
        super().__init__()
        channels = int(32 * width_multiplier)
        check_positive(num_classes=num_classes, channels=channels)
        stem = normalised("", same_conv(3, channels, (3, 3), size=input_size, stride=2), channels)
        self.stem = nn.Sequential(OrderedDict(stem))
        size = same_size(input_size, 2)
        self.block_names = tuple(f"block{index}" for index in range(1, len(_BLOCKS) + 1))
        for name, (full_width, stride) in zip(self.block_names, _BLOCKS, strict=True):
            out_channels = int(full_width * width_multiplier)
            self.add_module(name, separable_block(channels, out_channels, size=size, stride=stride))
            channels, size = out_channels, same_size(size, stride)
        self.pool = nn.AvgPool2d(size)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        frontier = self.stem(images)
        for name in self.block_names:
            frontier = getattr(self, name)(frontier)
        logits: torch.Tensor = self.fc(self.flatten(self.pool(frontier)))
        return logits


def load_mlperf_mobilenet_v1(path: str | Path) -> tuple[MobileNetV1, dict[str, str]]:
    """MLPerf Tiny's MobileNetV1-0.25 from a safetensors file, in eval mode, with the file's metadata.

    The file keeps Keras's layer names: one counter per layer type, in order of execution.

    Raises:
        FormatError: the file does not hold this network.
    """

    def numbered(name: str, index: int) -> str:
        return f"{name}_{index}" if index else name

    model = MobileNetV1()
    names = {"conv2d": "stem.conv", "batch_normalization": "stem.bn", "dense": "fc"}
    for index, block in enumerate(model.block_names):
        names[numbered("depthwise_conv2d", index)] = f"{block}.dw_conv"
        names[numbered("batch_normalization", 2 * index + 1)] = f"{block}.dw_bn"
        names[numbered("conv2d", index + 1)] = f"{block}.pw_conv"
        names[numbered("batch_normalization", 2 * index + 2)] = f"{block}.pw_bn"
    metadata = load_renamed(model, path, names)
    return model.eval(), metadata
