"""The experiments: what the data, the dense network and one example input are."""

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
    Subset,
    cifar_augment,
    digits,
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
    memory_format: torch.memory_format = torch.contiguous_format

    def train_loader(self, *, batch_size: int, seed: int) -> Loader:
        """Augmented, in an order that every arm of one seed shares."""
        return Loader(
            self.train, batch_size=batch_size, shuffle=True, seed=seed, augment=self.augment, drop_last=True
        )

    def batches(self, dataset: Dataset, *, batch_size: int = 128) -> Loader:
        """As they are, in order."""
        return Loader(dataset, batch_size=batch_size, augment=self.select)

    def example(self, count: int = 2) -> Any:
        """Inputs of ``count`` training samples, as the model takes them."""
        return next(iter(self.batches(self.train, batch_size=count)))[0]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = self.build()
        return model.to(memory_format=self.memory_format)  # type: ignore[call-overload,no-any-return]


def open_experiment(recipe: dict[str, Any], data: Sequence[str], cache: Path) -> Experiment:
    """The experiment that a recipe names, on the files given."""
    return OPENERS[recipe["experiment"]](recipe, list(data), cache)


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
    return Experiment("modelnet40", train, val, test, build, augment, select)


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
    return Experiment(
        "cifar100", train, val, test, build, _augment_image, _channels_last, torch.channels_last
    )


def _augment_image(images: Tensor, generator: torch.Generator) -> Tensor:
    return _channels_last(cifar_augment(images, generator), generator)


def _channels_last(images: Tensor, generator: torch.Generator) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


# --- small images: scikit-learn's digits, keyword spotting ------------------------------------------------


def _digits(recipe: dict[str, Any], data: list[str], cache: Path) -> Experiment:
    """Bundled with scikit-learn, so no data are given."""
    parts = [digits(split) for split in ("train", "val", "test")]
    return Experiment("digits", *parts, *_small_resnet(recipe, parts[0]))


def _keywords(recipe: dict[str, Any], data: list[str], cache: Path) -> Experiment:
    """Twelve words of Speech Commands as MFCC features; speakers are disjoint between the parts."""
    if len(data) != 1:
        raise SystemExit("keywords needs --data FILE.npz with test_x, test_y and test_speaker")
    file = Path(data[0])
    source = open_dataset(file / "kws_sc2_mfcc_int8.npz" if file.is_dir() else file, split="test")
    assert isinstance(source, ArrayDataset)
    with np.load(file / "kws_sc2_mfcc_int8.npz" if file.is_dir() else file) as archive:
        speakers = archive["test_speaker"]
    settings = recipe["data"]
    unique = np.random.default_rng(settings["split_seed"]).permutation(np.unique(speakers))
    cuts = np.cumsum([round(share * len(unique)) for share in settings["speakers"]])[:2]
    groups = [np.isin(speakers, part) for part in np.split(unique, cuts)]
    values = np.asarray(source.values, dtype=np.float32)[:, None]
    mean, deviation = float(values[groups[0]].mean()), float(values[groups[0]].std())
    whole = ArrayDataset(values, source.labels, source.classes, "image", offset=-mean, scale=1 / deviation)
    parts = [Subset(whole, np.flatnonzero(group)) for group in groups]
    return Experiment("keywords", *parts, *_small_resnet(recipe, parts[0]))


def _small_resnet(recipe: dict[str, Any], train: Dataset) -> tuple[Any, Any, None]:
    """Constructor, augmentation (random shifts), and no selection, for images of one channel."""
    from sigmab_plugin.models import Bottleneck, ResNet

    model = dict(recipe["model"])
    build = functools.partial(
        ResNet,
        Bottleneck,
        model.pop("layers"),
        num_classes=len(train.classes),
        stem="cifar",
        in_channels=1,
        **model,
    )
    return build, functools.partial(_shift, padding=tuple(recipe["data"]["shift"])), None


def _shift(images: Tensor, generator: torch.Generator, *, padding: tuple[int, int]) -> Tensor:
    """Each image moved by up to ``padding`` rows and columns; zeros come in."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [padding[1], padding[1], padding[0], padding[0]])
    top = torch.randint(2 * padding[0] + 1, (count,), generator=generator)
    left = torch.randint(2 * padding[1] + 1, (count,), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, :]
    moved = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns]
    return moved.permute(0, 3, 1, 2).contiguous()


OPENERS = {"modelnet40": _modelnet40, "cifar100": _cifar100, "digits": _digits, "keywords": _keywords}
