"""The two experiments: what the data, the dense network and one example input are."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sigmab_plugin.data import (
    ArrayDataset,
    Dataset,
    Loader,
    cifar_augment,
    make_loader,
    open_dataset,
    point_cloud_augment,
    split_validation,
)
from sigmab_plugin.models.pointnet2 import order_points

PointBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Experiment:
    """Data splits and the dense network's constructor. ``evaluate_on`` and ``train_loader`` give batches."""

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    build: Any
    augment: Any
    select: Any
    recipe: dict[str, Any]

    def train_loader(self, *, batch_size: int, seed: int) -> Loader:
        """Augmented, in an order that every arm of one seed shares."""
        return make_loader(
            self.train, batch_size=batch_size, shuffle=True, seed=seed, augment=self.augment, drop_last=True
        )

    def batches(self, dataset: Dataset, *, batch_size: int = 128) -> Loader:
        """As they are, in order."""
        return make_loader(dataset, batch_size=batch_size, augment=self.select)

    def example(self, count: int = 2) -> Any:
        """Inputs of ``count`` training samples, as the model takes them."""
        return next(iter(self.batches(self.train, batch_size=count)))[0]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = self.build()
        return model


def open_experiment(recipe: dict[str, Any], data: Sequence[str], cache: Path) -> Experiment:
    """The experiment that a recipe names, on the files given."""
    opener = {"modelnet40": _modelnet40, "cifar100": _cifar100}[recipe["experiment"]]
    return opener(recipe, list(data), cache)


# --- ModelNet40 -------------------------------------------------------------------------------------------


def _modelnet40(recipe: dict[str, Any], data: list[str], cache: Path) -> Experiment:
    """Each cloud is put in farthest-point order once; training draws ``points`` of the first ``pool``."""
    from sigmab_plugin.models import PointNet2

    settings = recipe["data"]
    points, pool = settings["points"], settings["pool"]
    train_file, test_file = _pair(data)
    whole = _ordered(train_file, "train", pool, cache)
    test = _ordered(test_file, "test", pool, cache)
    train, val = split_validation(whole, fraction=settings["validation"], seed=settings["validation_seed"])
    model = {key: tuple(v) if isinstance(v, list) else v for key, v in recipe["model"].items()}
    augment = functools.partial(_augment_cloud, points=points, options=settings["augment"])
    select = functools.partial(_first, points=points)
    build = functools.partial(PointNet2, len(whole.classes), sampling="prefix", **model)
    return Experiment("modelnet40", train, val, test, build, augment, select, recipe)


def _pair(data: list[str]) -> tuple[str, str]:
    if len(data) == 1 and Path(data[0]).is_dir():
        folder = Path(data[0])
        found = sorted(folder.glob("modelnet40-train.npz")), sorted(folder.glob("modelnet40-test.npz"))
        if all(found):
            return str(found[0][0]), str(found[1][0])
        return data[0], data[0]  # a folder of HDF5 files holds both splits
    if len(data) != 2:
        raise SystemExit("modelnet40 needs --data FOLDER, or --data TRAIN --data TEST")
    return data[0], data[1]


def _ordered(file: str, split: str, pool: int, cache: Path) -> ArrayDataset:
    source = open_dataset(file, split=split)
    assert isinstance(source, ArrayDataset)
    stamp = Path(file).stat()
    key = f"{Path(file).resolve()} {stamp.st_size} {stamp.st_mtime_ns} {split} {pool}"
    target = cache / f"ordered-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not target.exists():
        ordered = order_points(source.decode(np.asarray(source.values)), pool)
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".tmp")
        with open(partial, "wb") as stream:
            np.save(stream, ordered.numpy())
        partial.replace(target)
    return ArrayDataset(np.load(target), source.labels, source.classes, "points")


def _first(batch: PointBatch, generator: torch.Generator, *, points: int) -> PointBatch:
    pos, index = batch
    clouds = int(index[-1]) + 1
    pos = pos.view(clouds, -1, 3)[:, :points]
    return pos.reshape(-1, 3), torch.arange(clouds).repeat_interleave(points)


def _augment_cloud(
    batch: PointBatch, generator: torch.Generator, *, points: int, options: dict[str, Any]
) -> PointBatch:
    pos, index = batch
    clouds = int(index[-1]) + 1
    pos = pos.view(clouds, -1, 3)
    kept = torch.rand(pos.shape[:2], generator=generator).topk(points, dim=1).indices.sort(dim=1).values
    pos = pos.gather(1, kept[..., None].expand(-1, -1, 3)).reshape(-1, 3)
    return point_cloud_augment(
        (pos, torch.arange(clouds).repeat_interleave(points)),
        generator,
        **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()},
    )


# --- CIFAR-100 --------------------------------------------------------------------------------------------

_CIFAR_MEAN = (0.5071, 0.4865, 0.4409)
_CIFAR_STD = (0.2673, 0.2564, 0.2762)


def _cifar100(recipe: dict[str, Any], data: list[str], cache: Path) -> Experiment:
    from sigmab_plugin.models import cifar_resnet50

    if len(data) == 1 and Path(data[0]).is_dir():
        data = [str(p) for p in sorted(Path(data[0]).glob("cifar100-*.zip"))] or data
    options: dict[str, Any] = {"cache_dir": cache, "mean": _CIFAR_MEAN, "std": _CIFAR_STD}
    whole = open_dataset(data, split="train", **options)
    test = open_dataset(data, split="test", **options)
    settings = recipe["data"]
    train, val = split_validation(whole, fraction=settings["validation"], seed=settings["validation_seed"])
    build = functools.partial(cifar_resnet50, len(whole.classes), **recipe["model"])
    return Experiment("cifar100", train, val, test, build, _augment_image, None, recipe)


def _augment_image(images: Tensor, generator: torch.Generator) -> Tensor:
    return cifar_augment(images, generator)
