"""Small instances of the model families that users bring, with the cut and the data for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin.config import SigmaBConfig
from sigmab_plugin.models import cifar_resnet50


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.layer3 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """Flattens a 2x2 map, so that each channel meets four columns of the first linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, "M", 16, 16, "M", 24, 24, "M"):
            if width == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, int(width), 3, padding=1),
                    nn.BatchNorm2d(int(width)),
                    nn.ReLU(),
                ]
                channels = int(width)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(24 * 4, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.block = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
            InvertedResidual(8, 8, 1),
            InvertedResidual(8, 12, 2),
            InvertedResidual(12, 12, 1),
            InvertedResidual(12, 16, 2),
            InvertedResidual(16, 16, 1),
            nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        return self.classifier(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class GroupedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.b = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, stride, 1, groups=4, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.c = nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.proj = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.proj(x) + self.c(self.b(self.a(x))))


class RegNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.s1, self.s2, self.s3 = GroupedBlock(8, 16, 1), GroupedBlock(16, 32, 2), GroupedBlock(32, 48, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.s3(self.s2(self.s1(self.stem(x))))).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(2 * growth),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(torch.relu(self.norm2(self.conv1(torch.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    """Levels end in a concatenation of several groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.block1 = nn.Sequential(DenseLayer(8, 6), DenseLayer(14, 6))
        self.trans1 = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 12, 1), nn.AvgPool2d(2))
        self.block2 = nn.Sequential(DenseLayer(12, 8), DenseLayer(20, 8))
        self.norm = nn.BatchNorm2d(28)
        self.fc = nn.Linear(28, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.trans1(self.block1(self.stem(x))))
        return self.fc(torch.relu(self.norm(x)).mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.pw1, self.pw2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.scale * self.pw2(nn.functional.gelu(self.pw1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.stage1 = nn.Sequential(ConvNeXtBlock(8), nn.Conv2d(8, 16, 2, 2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(16), nn.Conv2d(16, 24, 2, 2))
        self.stage3 = nn.Sequential(nn.Conv2d(24, 24, 1), ConvNeXtBlock(24))
        self.norm, self.fc = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.norm(x.mean((2, 3))))


class Encoder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The residual stream crosses every cut: it stays complete, and the feed-forward parts are split."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.blocks = nn.Sequential(*[Encoder(16) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.PReLU(8))
        self.b = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.PReLU(16))
        self.c = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.InstanceNorm2d(24, affine=True), nn.ReLU())
        self.d = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))).mean((2, 3)))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(10, 16), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.c = nn.Sequential(nn.Linear(24, 32), nn.ReLU())
        self.d = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x))))


def _modes(count: int, *shape: int) -> torch.Tensor:
    """Four kinds of samples, so that there is something to cluster."""
    centres = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    return torch.randn(count, *shape) * 0.5 + 1.5 * centres[torch.arange(count) % 4]


def _images(count: int) -> torch.Tensor:
    return _modes(count, 3, 16, 16)


def _vectors(count: int) -> torch.Tensor:
    return _modes(count, 10)


def _clouds(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = torch.randint(40, 64, (count,))
    batch = torch.arange(count).repeat_interleave(sizes)
    # Flat, long, thick and small clouds.
    scale = torch.tensor([[1, 1, 0.1], [0.2, 0.2, 1], [1, 1, 1], [0.3, 0.3, 0.3]])
    return torch.randn(int(sizes.sum()), 3) * scale[batch % 4], batch


def _pointnet() -> nn.Module:
    pytest.importorskip("torch_geometric")
    from sigmab_plugin.models import PointNet2

    return PointNet2(5, width=0.125)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    config: SigmaBConfig
    inputs: Callable[[int], Any] = _images
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        # Trained networks have uneven statistics; fresh ones would hide a wrong index.
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
        return model

    def batches(self, count: int = 3, size: int = 12) -> list[Any]:
        torch.manual_seed(1)
        return [self.inputs(size) for _ in range(count)]


def _config(*levels: str, head: str, **options: Any) -> SigmaBConfig:
    return SigmaBConfig(levels=levels, head=head, projection_dim=16, **options)


CASES = [
    Case("resnet50", lambda: cifar_resnet50(5, width=0.125), _config("layer3", "layer4", head="fc"), _images),
    Case("resnet18", ResNet18, _config("layer2", "layer3", head="fc")),
    Case("resnet18-mid-stage", ResNet18, _config("layer2.1", "layer3", head="fc")),
    Case("vgg", VGG, _config("features.7", "features.10", head="classifier")),
    Case("mobilenet_v2", MobileNetV2, _config("features.2", "features.4", head="classifier")),
    Case("regnet", RegNet, _config("s2", "s3", head="fc")),
    Case("densenet", DenseNet, _config("block1", "block2", head="fc")),
    Case("convnext", ConvNeXt, _config("stage2", "stage3", head="fc")),
    Case("vit", ViT, _config("blocks.1", "blocks.2", head="head")),
    Case("groupnorm", GroupNormNet, _config("b", "c", head="d")),
    Case("mlp", MLP, _config("b", "c", head="d"), _vectors),
    Case("mlp-one-level", MLP, _config("b", head="d"), _vectors),
    Case("mlp-three-levels", MLP, _config("b.0", "b.2", "c", head="d"), _vectors),
    Case(
        "unequal-branches",
        ResNet18,
        _config("layer2", "layer3", head="fc", widths={"0": 9, "1": {"output": 13, "inner": 7}, "1/0": 30}),
    ),
    Case("pointnet2", _pointnet, _config("sa3", "fc1", head="head"), _clouds),
]
