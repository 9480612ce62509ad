"""Opening data files: image folders and zips of them, NumPy archives, ModelNet40 in HDF5, bundled digits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError, MissingDependencyError
from .dataset import ArrayDataset, Dataset, Subset, class_indices
from .images import SPLITS, PathLike, choose_split, image_dataset, list_images, open_images, split_in_name


def open_dataset(
    path: PathLike | Sequence[PathLike],
    *,
    split: str | None = None,
    cache_dir: PathLike | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Dataset:
    """Open real data as a dataset of (tensor, int label).

    Args:
        path: a folder or zip in ImageFolder layout (``[split/]class/image``), an ``.npz``, an HDF5 file of
            ModelNet40 (``data``, ``label``) or a folder of them. Several zips or HDF5 files of one dataset
            may be given as a list, or as one string with commas. Hidden files are not read. Classes are those
            of all splits, sorted by name, so that an index means the same class in each.
        split: ``"train"``, ``"test"``, … where the source holds several, see :func:`splits_of`; None reads
            the only one, or everything where the source has no splits.
        cache_dir: decoded images are kept there as one ``.npy`` and memory-mapped from then on.
        image_size: images are resized (short side) and cropped to it; needed where their sizes differ.
        mean, std: uint8 images are scaled to [0, 1] and normalised with these, per channel; None is ImageNet's
            for three channels, and no normalisation for any other number.

    Forms of ``.npz``: ``points`` with ``labels`` and ``classes`` (integers are taken as fractions of their
    type's maximum); or ``x`` with ``y``; or ``<split>_x`` with ``<split>_y``; class names from ``classes`` or
    ``words`` where present. uint8 arrays (N, H, W, C) or (N, C, H, W) are images.

    Returns:
        :class:`Dataset` with ``classes``, ``kind`` and ``collate_fn``.

    Raises:
        ConfigError: no such file, a split that is not there (what is there is named), or ``mean=`` or ``std=``
            that do not fit the data.
        FormatError: a file that is damaged, empty or of a form that is not known; a class folder without
            images; labels that are no whole numbers.
        MissingDependencyError: Pillow or h5py is needed.
    """
    paths = _paths(path)
    form = _form(paths)
    if form == "images":
        return open_images(paths, split, cache_dir, image_size, mean, std)
    if form == "npz":
        return _open_npz(paths[0], split, mean, std)
    _refuse_normalisation(paths[0], mean, std)
    return _open_hdf5(paths, split)


def splits_of(path: PathLike | Sequence[PathLike]) -> tuple[str, ...]:
    """Names that ``open_dataset(path, split=)`` takes, sorted; () where all data are one, read with split None.

    Splits are the folders at the root of images, the ``<split>`` of ``<split>_x`` in an ``.npz``, and else what
    a file is named as: ``cifar100-train.zip``, ``modelnet40-test.npz``, ``ply_data_train0.h5``, a folder
    ``train``.

    Raises:
        ConfigError, FormatError: as :func:`open_dataset`.
    """
    paths = _paths(path)
    form = _form(paths)
    if form == "images":
        found = {image.split for image in list_images(paths)}
    elif form == "npz":
        found = set(_npz_splits(paths[0], _read_npz(paths[0])))
    else:
        found = {_hdf5_split(file) for file in _hdf5_files(paths)}
    return tuple(sorted(found - {""}))


def digits(split: str | None = None) -> Dataset:
    """scikit-learn's bundled handwritten digits: 1 797 images (1, 8, 8) in [0, 1], 10 classes, offline.

    Args:
        split: ``"train"`` (1 197), ``"val"`` (240) or ``"test"`` (360): a fixed stratified split; None gives all.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the digits need scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = (bunch.images[:, None] / 16.0).astype(np.float32)
    dataset = ArrayDataset(images, bunch.target, [str(i) for i in range(10)], "image")
    if split is None:
        return dataset
    if split not in ("train", "val", "test"):
        raise ConfigError(f"digits has the splits 'train', 'val' and 'test'; got {split!r}")
    generator = np.random.default_rng(1797)
    # Dealt out class by class in turn, so that shares hold for every class.
    order = np.concatenate([generator.permutation(np.flatnonzero(bunch.target == c)) for c in range(10)])
    turn = np.arange(len(order)) % 15
    chosen = {"test": turn < 3, "val": (turn >= 3) & (turn < 5), "train": turn >= 5}[split]
    return Subset(dataset, np.sort(order[chosen]))


def _paths(path: PathLike | Sequence[PathLike]) -> list[Path]:
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        names: list[str] = (
            [text] if os.path.exists(text) else [p.strip() for p in text.split(",") if p.strip()]
        )
    else:
        names = [os.fspath(p) for p in path]
    if not names:
        raise ConfigError("no data path was given")
    for name in names:
        if not os.path.exists(name):
            raise ConfigError(f"no such file or folder: {name}")
    return [Path(name) for name in names]


def _form(paths: Sequence[Path]) -> str:
    """``"images"``, ``"hdf5"`` or ``"npz"``."""
    if all(p.suffix == ".zip" for p in paths):
        return "images"
    if all(_is_hdf5(p) for p in paths):
        return "hdf5"
    if len(paths) > 1:
        raise ConfigError("several paths must all be zips or all be HDF5 files")
    if paths[0].is_dir():
        return "images"
    if paths[0].suffix == ".npz":
        return "npz"
    raise FormatError(f"{paths[0]}: expected a folder, .zip, .npz, .h5 or .hdf5")


# --- arrays -----------------------------------------------------------------------------------------------


def _open_npz(
    path: Path, split: str | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Dataset:
    arrays = _read_npz(path)
    parts = _npz_splits(path, arrays)
    chosen = choose_split(str(path), split, [name for name in parts if name], whole="" in parts)
    x_name, y_name = parts[chosen]
    values, labels = arrays[x_name], _labels(path, y_name, arrays[y_name])
    names = arrays.get("classes", arrays.get("words"))
    if names is None:
        # Of all splits, so that they agree on the number of classes.
        every = [_labels(path, y, arrays[y]) for _, y in parts.values()]
        classes = [str(i) for i in range(max(int(y.max(initial=-1)) for y in every) + 1)]
    else:
        classes = [n.decode() if isinstance(n, bytes) else str(n) for n in np.atleast_1d(names).tolist()]
    if values.ndim == 0 or len(values) != labels.size:
        raise FormatError(f"{path}: {x_name} has shape {values.shape}, but {y_name} has {labels.size} labels")
    if not labels.size:
        raise FormatError(f"{path}: {x_name} holds no samples")
    if values.dtype.kind not in "biuf":
        raise FormatError(f"{path}: {x_name} holds {values.dtype}; expected numbers")
    if x_name != "points" and values.ndim == 4 and values.dtype == np.uint8:
        if values.shape[1] in (1, 3) and values.shape[-1] not in (1, 3):
            values = np.moveaxis(values, 1, -1)
        return image_dataset(values, labels, classes, mean, std, str(path))
    _refuse_normalisation(path, mean, std)
    if x_name == "points":
        if values.ndim != 3 or values.shape[-1] < 3:
            raise FormatError(f"{path}: points must be (clouds, points, 3); got {values.shape}")
        # Integer coordinates are fixed point: the type's maximum stands for 1.
        scale = 1.0 / np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0
        return ArrayDataset(values, labels, classes, "points", scale=scale)
    return ArrayDataset(values, labels, classes, "image" if values.ndim == 4 else "features")


def _labels(path: Path, name: str, values: Any) -> np.ndarray:
    try:
        return class_indices(values)
    except ConfigError as error:
        raise FormatError(f"{path}: {name}: {error}") from error


def _refuse_normalisation(path: Path, mean: object, std: object) -> None:
    if mean is not None or std is not None:
        raise ConfigError(
            f"{path}: mean= and std= normalise uint8 images, and these data are none; leave them out"
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # damaged archives and headers raise many kinds
        raise FormatError(f"{path}: damaged or no .npz file ({error}); copy it again") from error


def _npz_splits(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Split -> names of its two arrays; "" where the file, by its name too, has data of no split."""
    parts = {
        name[:-2]: (name, f"{name[:-2]}_y")
        for name in sorted(arrays)
        if name.endswith("_x") and f"{name[:-2]}_y" in arrays
    }
    for pair in (("points", "labels"), ("x", "y"), ("x", "labels"), ("data", "label")):
        if all(name in arrays for name in pair):
            return {**parts, ("" if parts else split_in_name(path)): pair}
    if not parts:
        known = "points with labels, x with y, or <split>_x with <split>_y"
        raise FormatError(
            f"{path}: no known arrays; expected {known}, found {', '.join(sorted(arrays)) or 'none'}"
        )
    return parts


def _is_hdf5(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.h5")) or any(path.glob("*.hdf5"))
    return path.suffix in (".h5", ".hdf5")


def _hdf5_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        files += sorted([*path.glob("*.h5"), *path.glob("*.hdf5")]) if path.is_dir() else [path]
    return files


def _hdf5_split(file: Path) -> str:
    return max((name for name in SPLITS if name in file.stem), key=len, default="")


def _open_hdf5(paths: Sequence[Path], split: str | None) -> Dataset:
    files = _hdf5_files(paths)
    named = sorted({_hdf5_split(file) for file in files} - {""})
    chosen = files if split is None else [file for file in files if split in file.stem]
    if not chosen or (split is None and len(named) > 1):
        choose_split(", ".join(str(file) for file in files), split, named, whole=False)
    classes: list[str] | None = None
    for path in paths:
        names = (path if path.is_dir() else path.parent) / "shape_names.txt"
        if names.exists():
            classes = names.read_text().split()
    # Without names, the labels of all splits tell how many classes there are.
    read = {file: _read_hdf5(file) for file in (files if classes is None else chosen)}
    sizes = {read[file][0].shape[1] for file in chosen}
    if len(sizes) > 1:
        found = ", ".join(f"{file.name} {read[file][0].shape[1]}" for file in chosen)
        raise FormatError(f"clouds differ in their number of points ({found}); open these files one by one")
    target = np.concatenate([read[file][1] for file in chosen])
    if not target.size:
        raise FormatError(f"{', '.join(map(str, chosen))}: no samples")
    if classes is None:
        classes = [str(i) for i in range(max(int(y.max(initial=-1)) for _, y in read.values()) + 1)]
    return ArrayDataset(np.concatenate([read[file][0] for file in chosen]), target, classes, "points")


def _read_hdf5(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Clouds (N, points, 3) float32 and labels (N,) int64."""
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError("reading HDF5 needs h5py: pip install h5py") from error
    try:
        with h5py.File(file, "r") as stream:
            points = np.asarray(stream["data"], dtype=np.float32)[..., :3]
            labels = np.asarray(stream["label"])
    except Exception as error:  # h5py raises many kinds
        raise FormatError(f"{file}: damaged, or without 'data' and 'label' ({error})") from error
    target = _labels(file, "label", labels)
    if points.ndim != 3 or points.shape[-1] != 3 or len(points) != len(target):
        raise FormatError(
            f"{file}: data must be (clouds, points, 3) with one label each; got {points.shape}, {len(target)} labels"
        )
    return points, target
