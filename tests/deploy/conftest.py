"""A small tree with the structure of a SigmaB net, and its bundle."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.deploy import export
from sigmab_plugin.tree.modality import Images

torch.set_num_threads(1)


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Router(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(channels, 8), nn.LayerNorm(8), nn.Dropout(0.1))
        self.router = nn.Linear(8, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.router(self.projection(pooled))


class Tree(nn.Module):
    """Two levels, four leaves; routers without bias towards a branch, so that all leaves occur."""

    leaves = ("0/0", "0/1", "1/0", "1/1")
    inner_nodes = ("", "0", "1")

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.backbone = block(3, width, 1)
        self.routers = nn.ModuleDict({"root": Router(width), "0": Router(width), "1": Router(width)})
        self.specializers = nn.ModuleDict({k: block(width, width, 2) for k in ("0", "1")})
        self.specializers.update({p.replace("/", "_"): block(width, 2 * width, 2) for p in self.leaves})
        self.heads = nn.ModuleDict(
            {
                p.replace("/", "_"): nn.Sequential(
                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes)
                )
                for p in self.leaves
            }
        )
        self.modality = Images()
        self.modalities = (Images(), Images(), Images())
        self.plan: Any = SimpleNamespace(to_dict=lambda: {"version": 1, "levels": ["a", "b"]})

    @torch.no_grad()
    def balance(self, x: Tensor) -> None:
        """Shift each router so that it halves the samples that reach it."""

        def halve(key: str, frontier: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.routers[key](frontier.mean((2, 3)))
            margins = (logits[:, 0] - logits[:, 1]).sort().values
            self.routers[key].router.bias[0] -= margins[len(margins) // 2 - 1 :][
                :2
            ].mean()  # no sample on the border
            branch = self.routers[key](frontier.mean((2, 3))).argmax(1)
            return frontier[branch == 0], frontier[branch == 1]

        for k, part in enumerate(halve("root", self.backbone(x))):
            halve(str(k), self.specializers[str(k)](part))

    @torch.no_grad()
    def reference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hard routing, sample by sample: logits and leaf indices."""
        logits, leaves = [], []
        for sample in x.split(1):
            path, frontier = "", self.backbone(sample)
            while path not in self.leaves:
                branch = int(self.routers[path.replace("/", "_") or "root"](frontier.mean((2, 3))).argmax(1))
                path = f"{path}/{branch}" if path else str(branch)
                frontier = self.specializers[path.replace("/", "_")](frontier)
            logits.append(self.heads[path.replace("/", "_")](frontier))
            leaves.append(self.leaves.index(path))
        return torch.cat(logits), torch.tensor(leaves)


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def net(images: Tensor) -> Tree:
    torch.manual_seed(0)
    tree = Tree().eval()
    for module in tree.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    tree.balance(images)
    return tree


@pytest.fixture(scope="session")
def expected(net: Tree, images: Tensor) -> tuple[Tensor, Tensor]:
    logits, leaves = net.reference(images)
    assert len(leaves.unique()) == 4
    return logits, leaves


@pytest.fixture(scope="session")
def bundle(net: Tree, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch bundle: the quickest to export; read only."""
    directory = tmp_path_factory.mktemp("bundles") / "torch"
    export(net, images[:2], directory, format="torch")
    return directory


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def onnx_bundle(net: Tree, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    directory = tmp_path_factory.mktemp("bundles") / "onnx"
    export(net, images[:2], directory, format="onnx")
    return directory
