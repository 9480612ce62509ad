"""Networks whose cuts are known, small ones and the package's own."""

from __future__ import annotations

import torch
from torch import nn

from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.models.mobilenet_v1 import MobileNetV1
from sigmab_plugin.models.resnet import cifar_resnet18


class Twice(nn.Module):
    """One block called twice, one activation called everywhere, functional calls between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem(image))
        x = self.relu(self.block(x))
        x = self.block(x) * 2
        x = nn.functional.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))


class InputAgain(nn.Module):
    """The input is read again beside ``first``: no single frontier until the two are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.cat([self.first(image), image], 1))
        return self.fc(x.mean((2, 3)))


class Sizes(nn.Module):
    """The number of samples is read from the input at the start, and from a map before its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.fc = nn.Linear(64, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        count = image.shape[0]
        x = self.second(self.first(image))
        rows = x.size(2)
        x = nn.functional.relu(x).reshape(count, 4, rows, -1)
        return self.fc(x.view(image.size(0), -1))


class Pair(nn.Module):
    """A block that returns two maps, which are added outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.split = SplitBlock()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        left, right = self.split(image)
        return self.fc(self.body(left + right).mean((2, 3)))


class SplitBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left(image), self.right(image)


CASES = {
    "ds_cnn": (DSCNN, (2, 1, 49, 10)),
    "mobilenet_v1": (MobileNetV1, (2, 3, 96, 96)),
    "resnet18": (cifar_resnet18, (2, 3, 32, 32)),
    "twice": (Twice, (2, 3, 8, 8)),
    "input_again": (InputAgain, (2, 3, 8, 8)),
    "sizes": (Sizes, (2, 3, 8, 8)),
    "pair": (Pair, (2, 3, 8, 8)),
}


def dense(case: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = CASES[case]
    model = build().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(shape)
