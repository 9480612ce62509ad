"""Opening data files: image folders and zips of them, NumPy archives, ModelNet40 in HDF5, bundled digits."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FormatError, MissingDependencyError
from .dataset import ArrayDataset, Dataset, Subset

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
SPLITS = ("train", "val", "valid", "validation", "test")
#: Statistics of ImageNet, which most pretrained networks expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PathLike = Union[str, "os.PathLike[str]"]
#: An image that is not read yet: (name inside the source, reader of its bytes).
_Image = tuple[str, Callable[[], bytes]]


def open_dataset(
    path: PathLike | Sequence[PathLike],
    *,
    split: str | None = None,
    cache_dir: PathLike | None = None,
    image_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Dataset:
    """Open real data as a dataset of (tensor, int label).

    Args:
        path: a folder or zip in ImageFolder layout (``[split/]class/image``), an ``.npz``, an HDF5 file of
            ModelNet40 (``data``, ``label``) or a folder of them. Several zips or HDF5 files of one dataset
            may be given as a list, or as one string with commas.
        split: ``"train"``, ``"test"``, … where the source holds several; may be left out where it holds one.
        cache_dir: decoded images are kept there as one ``.npy`` and memory-mapped from then on.
        image_size: images are resized (short side) and cropped to it; needed where their sizes differ.
        mean, std: images are scaled to [0, 1] and normalised with these, per channel.

    Forms of ``.npz``: ``points`` with ``labels`` and ``classes`` (integers are taken as fractions of their
    type's maximum); or ``x`` with ``y``; or ``<split>_x`` with ``<split>_y``; class names from ``classes`` or
    ``words`` where present. uint8 arrays with 3 or 4 dimensions behind the first are images.

    Returns:
        :class:`Dataset` with ``classes``, ``kind`` and ``collate_fn``.

    Raises:
        ConfigError: no such file, or a split that is not there; what is there is named.
        FormatError: a file that is damaged or of a form that is not known.
        MissingDependencyError: Pillow or h5py is needed.
    """
    paths = _paths(path)
    if all(p.suffix == ".zip" for p in paths):
        return _open_images(_zip_images(paths), paths, split, cache_dir, image_size, mean, std)
    if all(_is_hdf5(p) for p in paths):
        return _open_hdf5(paths, split)
    if len(paths) > 1:
        raise ConfigError("several paths must all be zips or all be HDF5 files")
    if paths[0].is_dir():
        return _open_images(_folder_images(paths[0]), paths, split, cache_dir, image_size, mean, std)
    if paths[0].suffix == ".npz":
        return _open_npz(paths[0], split, mean, std)
    raise FormatError(f"{paths[0]}: expected a folder, .zip, .npz, .h5 or .hdf5")


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


# --- images -----------------------------------------------------------------------------------------------


def _folder_images(root: Path) -> list[_Image]:
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    return [(p.relative_to(root).as_posix(), p.read_bytes) for p in files]


def _zip_images(paths: Sequence[Path]) -> list[_Image]:
    images: list[_Image] = []
    for path in paths:
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise FormatError(f"{path}: damaged or no zip file ({error}); copy it again") from error
        names = [n for n in archive.namelist() if n.lower().endswith(IMAGE_SUFFIXES)]
        images += [(name, _zip_reader(archive, name, path)) for name in names]
    return sorted(images, key=lambda image: image[0])


def _zip_reader(archive: zipfile.ZipFile, name: str, path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise FormatError(f"{path}: {name} is damaged ({error}); copy the file again") from error

    return read


def _open_images(
    images: list[_Image],
    paths: Sequence[Path],
    split: str | None,
    cache_dir: PathLike | None,
    image_size: int | None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Dataset:
    source = ", ".join(map(str, paths))
    if not images:
        raise FormatError(f"{source}: no images; expected [split/]class/image ({', '.join(IMAGE_SUFFIXES)})")
    members = _select_split(images, split, source)
    classes = sorted({name.split("/")[-2] for name, _ in members})
    position = {name: i for i, name in enumerate(classes)}
    labels = [position[name.split("/")[-2]] for name, _ in members]
    key = "\n".join(
        [str(image_size), *(f"{p.resolve()} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths)]
    )
    key += "\n" + "\n".join(name for name, _ in members)
    values = _decoded(members, cache_dir, hashlib.sha256(key.encode()).hexdigest()[:16], image_size)
    return _image_dataset(values, labels, classes, mean, std)


def _select_split(images: list[_Image], split: str | None, source: str) -> list[_Image]:
    """Images of one split; their names end in class/file."""
    shallow = [name for name, _ in images if name.count("/") < 1]
    if shallow:
        raise FormatError(f"{source}: {shallow[0]} lies in no class folder; expected [split/]class/image")
    found: dict[str, list[_Image]] = {}
    for image in images:
        parts = image[0].split("/")
        found.setdefault(parts[-3] if len(parts) >= 3 and parts[-3] in SPLITS else "", []).append(image)
    if split is not None and split in found:
        return found[split]
    if len(found) == 1 and (split is None or "" in found):
        return next(iter(found.values()))
    named = ", ".join(sorted(repr(name) for name in found if name)) or "none"
    wanted = "several splits" if split is None else f"no split {split!r}"
    raise ConfigError(f"{source}: {wanted} (there: {named}); give split= one of them")


def _decoded(
    members: list[_Image], cache_dir: PathLike | None, key: str, image_size: int | None
) -> np.ndarray:
    """(N, H, W, 3) uint8; read from the cache where it is there, and written to it."""
    target = None if cache_dir is None else Path(cache_dir) / f"images-{key}.npy"
    if target is not None and target.exists():
        try:
            cached: np.ndarray = np.load(target, mmap_mode="r")
            if len(cached) == len(members):
                return cached
        except (ValueError, OSError) as error:
            _log.warning("%s is damaged (%s); decoding again", target, error)
    first = _decode_image(*members[0], image_size)
    values = np.empty((len(members), *first.shape), dtype=np.uint8)
    for i, (name, read) in enumerate(members):
        image = first if i == 0 else _decode_image(name, read, image_size)
        if image.shape != first.shape:
            raise ConfigError(
                f"{name} is {image.shape[:2]} but others are {first.shape[:2]}; give image_size="
            )
        values[i] = image
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        with open(partial, "wb") as stream:
            np.save(stream, values)
        os.replace(partial, target)
    return values


def _decode_image(name: str, read: Callable[[], bytes], image_size: int | None) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("reading images needs Pillow: pip install pillow") from error
    try:
        image = Image.open(io.BytesIO(read())).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise FormatError(f"{name} is no readable image ({error}); replace or remove it") from error
    if image_size is not None and image.size != (image_size, image_size):
        factor = image_size / min(image.size)
        size = (max(image_size, round(image.width * factor)), max(image_size, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def _image_dataset(
    values: np.ndarray, labels: Any, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> ArrayDataset:
    """uint8 images (N, H, W, C), normalised as (value / 255 - mean) / std."""
    channels = values.shape[-1]
    if channels == 3:
        middle, spread = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    else:
        middle, spread = torch.zeros(channels, 1, 1), torch.ones(channels, 1, 1)
    scale: Tensor = 1.0 / (255.0 * spread)
    return ArrayDataset(
        values, labels, classes, "image", scale=scale, offset=-255.0 * middle, channels_last=True
    )


# --- arrays -----------------------------------------------------------------------------------------------


def _open_npz(path: Path, split: str | None, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    arrays = _read_npz(path)
    x_name, y_name = _array_names(path, arrays, split)
    values, labels = arrays[x_name], arrays[y_name]
    names = arrays.get("classes", arrays.get("words"))
    if names is None:
        classes = [str(i) for i in range(int(labels.max()) + 1 if labels.size else 0)]
    else:
        classes = [n.decode() if isinstance(n, bytes) else str(n) for n in names.tolist()]
    if len(values) != labels.size:
        raise FormatError(f"{path}: {x_name} has {len(values)} samples, {y_name} {labels.size}")
    if x_name == "points":
        if values.ndim != 3 or values.shape[-1] < 3:
            raise FormatError(f"{path}: points must be (clouds, points, 3); got {values.shape}")
        # Integer coordinates are fixed point: the type's maximum stands for 1.
        scale = 1.0 / np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0
        return ArrayDataset(values, labels, classes, "points", scale=scale)
    if values.ndim == 4 and values.dtype == np.uint8:
        if values.shape[1] in (1, 3) and values.shape[-1] not in (1, 3):
            values = np.moveaxis(values, 1, -1)
        return _image_dataset(values, labels, classes, mean, std)
    return ArrayDataset(values, labels, classes, "image" if values.ndim == 4 else "features")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise FormatError(f"{path}: damaged or no .npz file ({error}); copy it again") from error


def _array_names(path: Path, arrays: dict[str, np.ndarray], split: str | None) -> tuple[str, str]:
    if split is not None and f"{split}_x" in arrays and f"{split}_y" in arrays:
        return f"{split}_x", f"{split}_y"
    for x_name, y_name in (("points", "labels"), ("x", "y"), ("x", "labels"), ("data", "label")):
        if x_name in arrays and y_name in arrays:
            return x_name, y_name
    parts = sorted(name[:-2] for name in arrays if name.endswith("_x") and f"{name[:-2]}_y" in arrays)
    if len(parts) == 1 and split is None:
        return f"{parts[0]}_x", f"{parts[0]}_y"
    if parts:
        raise ConfigError(f"{path}: give split= one of {', '.join(parts)}; got {split!r}")
    known = "points with labels, x with y, or <split>_x with <split>_y"
    raise FormatError(f"{path}: no known arrays; expected {known}, found {', '.join(sorted(arrays))}")


def _is_hdf5(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.h5")) or any(path.glob("*.hdf5"))
    return path.suffix in (".h5", ".hdf5")


def _open_hdf5(paths: Sequence[Path], split: str | None) -> Dataset:
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError("reading HDF5 needs h5py: pip install h5py") from error
    files: list[Path] = []
    classes: list[str] | None = None
    for path in paths:
        files += sorted([*path.glob("*.h5"), *path.glob("*.hdf5")]) if path.is_dir() else [path]
        names = (path if path.is_dir() else path.parent) / "shape_names.txt"
        if names.exists():
            classes = names.read_text().split()
    if split is not None:
        chosen = [f for f in files if split in f.stem]
        if not chosen:
            raise ConfigError(
                f"no HDF5 file named after split {split!r} among {', '.join(f.name for f in files)}"
            )
        files = chosen
    elif {s for s in ("train", "test") for f in files if s in f.stem} == {"train", "test"}:
        raise ConfigError(f"{paths[0]}: several splits (there: 'test', 'train'); give split= one of them")
    points, labels = [], []
    for file in files:
        try:
            with h5py.File(file, "r") as stream:
                points.append(np.asarray(stream["data"], dtype=np.float32)[..., :3])
                labels.append(np.asarray(stream["label"], dtype=np.int64).reshape(-1))
        except (OSError, KeyError) as error:
            raise FormatError(f"{file}: damaged, or without 'data' and 'label' ({error})") from error
    target = np.concatenate(labels)
    if classes is None:
        classes = [str(i) for i in range(int(target.max()) + 1)]
    return ArrayDataset(np.concatenate(points), target, classes, "points")
