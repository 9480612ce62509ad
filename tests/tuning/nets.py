"""Small real networks and data for the tuning tests; the distributed ranks import this file, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.config import SigmaBConfig
from sigmab_plugin.tree.net import Router, SigmaBNet
from sigmab_plugin.tree.plan import Plan
from sigmab_plugin.tuning.recipe import TrainRecipe

CLASSES = 4
BRANCHES = ("0", "1", "0/0", "0/1", "1/0", "1/1")
QUICK = TrainRecipe(lr=0.05, warmup_epochs=0.5, batch_size=16, epochs=3)
#: With a term whose value depends on the whole global batch.
BALANCED = QUICK.replace(balance_weight=0.5, router_lr_factor=0.5)


def block(inputs: int, outputs: int, *, norm: bool = True, dropout: float = 0.0) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(dropout))


def tree(*, norm: bool = True, dropout: float = 0.0, seed: int = 0, classes: int = CLASSES) -> SigmaBNet:
    """Two levels over images (B, 1, 6, 6)."""
    torch.manual_seed(seed)
    config = SigmaBConfig(levels=("level1", "level2"), head="head", projection_dim=8)
    plan = Plan(
        config=config,
        modalities=("images", "images", "images"),
        features=(8, 6, 6),
        groups=(),
        tensors=(),
        branches={},
        splits={},
    )
    return SigmaBNet(
        backbone=block(1, 8, norm=norm, dropout=dropout),
        routers={"": Router(8, 8), "0": Router(6, 8), "1": Router(6, 8)},
        specializers={
            path: block(8 if len(path) == 1 else 6, 6, norm=norm, dropout=dropout) for path in BRANCHES
        },
        heads={
            path: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
            for path in plan.leaves
        },
        plan=plan,
    )


def dense(*, norm: bool = True, seed: int = 0, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        block(1, 8, norm=norm),
        block(8, 8, norm=norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def samples(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (B, 1, 6, 6) of four textures with noise: plain, rows, columns, checkerboard."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    wave = torch.tensor([1.0, -1.0]).repeat(3)
    flat = torch.ones(6)
    textures = torch.stack(
        [torch.outer(a, b) for a, b in ((flat, flat), (wave, flat), (flat, wave), (wave, wave))]
    )
    images = textures[targets].unsqueeze(1) + 0.7 * torch.randn(count, 1, 6, 6, generator=generator)
    return images, targets


def loader(
    count: int = 96, *, batch: int = 16, seed: int = 0, shuffle: bool = True
) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*samples(count, seed)), batch_size=batch, shuffle=shuffle)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
