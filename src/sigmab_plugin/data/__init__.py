"""Real data for compressing and evaluating networks: files in, (tensor, label) pairs and seeded batches out."""

from __future__ import annotations

from .augment import cifar_augment, point_cloud_augment
from .dataset import ArrayDataset, Dataset, Subset, split_validation
from .files import digits, open_dataset, splits_of
from .loader import Loader

__all__ = [
    "ArrayDataset",
    "Dataset",
    "Loader",
    "Subset",
    "cifar_augment",
    "digits",
    "open_dataset",
    "point_cloud_augment",
    "split_validation",
    "splits_of",
]
