"""Datasets: labels and classes are known without reading a sample, batches are made from indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError

KINDS = ("image", "points", "features")


def class_indices(labels: Any) -> np.ndarray:
    """Labels as (N,) int64.

    Raises:
        ConfigError: they are no whole numbers.
    """
    values = np.asarray(labels).reshape(-1)
    if values.dtype.kind not in "biuf":
        raise ConfigError(f"labels must be class indices, whole numbers from 0; got {values.dtype}")
    whole = values if values.dtype.kind != "f" else np.nan_to_num(values).round()
    if not np.array_equal(whole, values):
        odd = values[whole != values][0]
        raise ConfigError(f"labels must be class indices, whole numbers from 0; got {odd}")
    return whole.astype(np.int64)


class Dataset(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Yields ``(tensor, label)``; also a map-style dataset for ``torch.utils.data.DataLoader``.

    Attributes:
        labels: (N,) int64 array, one class index per sample.
        classes: name of each class.
        kind: ``"image"`` (C, H, W), ``"points"`` (N, 3) or ``"features"`` (any one shape).
        collate_fn: list of samples -> (inputs, labels); inputs is a tensor (B, ...), or (pos, batch) for points.
    """

    def __init__(self, labels: Any, classes: Sequence[str], kind: str) -> None:
        self.labels = class_indices(labels)
        self.classes = list(classes)
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        self.kind = kind
        self.collate_fn: Callable[[Sequence[tuple[Tensor, int]]], tuple[Any, Tensor]] = (
            collate_points if kind == "points" else collate
        )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            span = f"{self.labels.min()}..{self.labels.max()}"
            raise ConfigError(f"labels {span} do not fit {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError

    def batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """Inputs and labels (B,) of the given samples, collated."""
        return self.collate_fn([self[int(i)] for i in indices])


class ArrayDataset(Dataset):
    """Samples held as one array (also memory-mapped), decoded batch by batch.

    Args:
        values: (N, ...) array. labels: (N,). classes: names. kind: see :class:`Dataset`.
        scale, offset: a float sample is ``(value + offset) * scale``; numbers, or tensors that broadcast
            against one sample.
        channels_last: image arrays are (N, H, W, C) and are turned to (C, H, W).
    """

    def __init__(
        self,
        values: np.ndarray,
        labels: Any,
        classes: Sequence[str],
        kind: str,
        *,
        scale: float | Tensor = 1.0,
        offset: float | Tensor = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__(labels, classes, kind)
        if len(values) != len(self.labels):
            raise ConfigError(f"{len(values)} samples but {len(self.labels)} labels")
        self.values = values
        self.scale = scale
        self.offset = offset
        self.channels_last = channels_last

    def decode(self, values: np.ndarray) -> Tensor:
        """Raw (B, ...) values as float32, normalised, channels first."""
        # Always a copy: the values may be the caller's, or mapped read-only, or of the other byte order.
        tensor = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        if self.channels_last:
            tensor = tensor.movedim(-1, 1).contiguous()
        return tensor.add_(self.offset).mul_(self.scale)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.decode(self.values[index : index + 1])[0], int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        index = np.asarray(indices, dtype=np.int64)
        inputs: Any = self.decode(self.values[index])
        if self.kind == "points":
            clouds, points = inputs.shape[:2]
            inputs = inputs.flatten(0, 1), torch.arange(clouds).repeat_interleave(points)
        return inputs, torch.from_numpy(self.labels[index])


class Subset(Dataset):
    """Some samples of a dataset, in the order of ``indices``; everything else as there."""

    def __init__(self, source: Dataset, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        super().__init__(source.labels[self.indices], source.classes, source.kind)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.source[int(self.indices[index])]

    def batch(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        return self.source.batch(self.indices[np.asarray(indices, dtype=np.int64)])  # type: ignore[arg-type]


def collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Stack samples of one shape: (B, ...) and labels (B,)."""
    shapes = {tuple(value.shape) for value, _ in samples}
    if len(shapes) > 1:
        found = ", ".join(map(str, sorted(shapes)))
        raise ConfigError(
            f"samples of different shapes cannot be stacked: {found}; give open_dataset image_size="
        )
    return torch.stack([value for value, _ in samples]), torch.tensor([label for _, label in samples])


def collate_points(samples: Sequence[tuple[Tensor, int]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Point clouds of any size as one ragged batch: ((pos (sum N, 3), batch (sum N,)), labels (B,))."""
    sizes = torch.tensor([len(value) for value, _ in samples])
    batch = torch.arange(len(samples)).repeat_interleave(sizes)
    return (torch.cat([value for value, _ in samples]), batch), torch.tensor([label for _, label in samples])


def split_validation(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """A stratified split into (train, validation); the same for the same labels and seed.

    Every class gives ``round(fraction * size)`` samples to validation, at least one, and keeps at least one.

    Raises:
        ConfigError: ``fraction`` outside (0, 1), or a class with a single sample.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction must lie between 0 and 1; got {fraction}")
    generator = np.random.default_rng(seed)
    train: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for label in np.unique(dataset.labels):
        members = generator.permutation(np.flatnonzero(dataset.labels == label))
        if len(members) < 2:
            name = dataset.classes[label]
            raise ConfigError(f"class {name!r} has one sample; a stratified split needs two or more")
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[:count])
        train.append(members[count:])
    return Subset(dataset, np.sort(np.concatenate(train))), Subset(dataset, np.sort(np.concatenate(held)))
