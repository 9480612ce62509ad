"""ResNets with torchvision's module names (He et al. 2015, stride on the 3x3 convolution).

``state_dict`` keys and the meaning of the values are those of torchvision's ``resnet50``, so its checkpoints
load unchanged into :func:`imagenet_resnet50`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError


class Bottleneck(nn.Module):
    """1x1 -> 3x3 -> 1x1 residual block; (B, C, H, W) -> (B, 4 * planes, H / stride, W / stride)."""

    expansion = 4

    def __init__(self, in_channels: int, planes: int, *, stride: int = 1) -> None:
        super().__init__()
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        activated: Tensor = self.relu(out)
        return activated


class BasicBlock(nn.Module):
    """3x3 -> 3x3 residual block; (B, C, H, W) -> (B, planes, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        activated: Tensor = self.relu(out)
        return activated


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(nn.Module):
    """Four stages of residual blocks; images (B, in_channels, H, W) -> logits (B, num_classes).

    Args:
        block: :class:`Bottleneck` or :class:`BasicBlock`.
        layers: blocks in each of the four stages.
        num_classes: outputs of ``fc``.
        stem: ``"imagenet"`` (7x7 stride 2 and max-pool) or ``"cifar"`` (3x3 stride 1, ``maxpool`` is an identity).
        width: every channel count is multiplied by it, at least 1 channel stays.
        in_channels: channels of the images.

    Raises:
        ConfigError: an unknown stem, a width that is not positive, or not four stages.
    """

    def __init__(
        self,
        block: type[Bottleneck] | type[BasicBlock],
        layers: Sequence[int],
        *,
        num_classes: int,
        stem: str = "imagenet",
        width: float = 1.0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "cifar"):
            raise ConfigError(f"stem must be 'imagenet' or 'cifar'; got {stem!r}")
        if not width > 0:
            raise ConfigError(f"width must be more than 0; got {width!r}")
        if len(layers) != 4:
            raise ConfigError(f"a ResNet has four stages; got {len(layers)} block counts")
        planes = [max(1, round(base * width)) for base in (64, 128, 256, 512)]
        channels = planes[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        stages = []
        for index, (stage_planes, count) in enumerate(zip(planes, layers, strict=True)):
            stages.append(_stage(block, channels, stage_planes, count, stride=1 if index == 0 else 2))
            channels = stage_planes * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(
    block: type[Bottleneck] | type[BasicBlock], in_channels: int, planes: int, count: int, *, stride: int
) -> nn.Sequential:
    first = block(in_channels, planes, stride=stride)
    return nn.Sequential(first, *(block(planes * block.expansion, planes) for _ in range(count - 1)))


def cifar_resnet50(num_classes: int = 100, *, width: float = 1.0) -> ResNet:
    """ResNet-50 for 32x32 images: 3x3 stride-1 stem, no max-pool. 23 705 252 parameters at 100 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, stem="cifar", width=width)


def imagenet_resnet50(num_classes: int = 1000, *, width: float = 1.0) -> ResNet:
    """ResNet-50 for 224x224 images, checkpoints as torchvision's. 25 557 032 parameters at 1000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, stem="imagenet", width=width)


def cifar_resnet18(num_classes: int = 100, *, width: float = 1.0, in_channels: int = 3) -> ResNet:
    """ResNet-18 for small images: 3x3 stride-1 stem, no max-pool."""
    return ResNet(
        BasicBlock, (2, 2, 2, 2), num_classes=num_classes, stem="cifar", width=width, in_channels=in_channels
    )
