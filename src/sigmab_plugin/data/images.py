"""Images in folders and zips: ``[split/]class/image``, decoded to one array and kept in a cache."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import torch

from ..errors import ConfigError, FormatError, MissingDependencyError
from .dataset import ArrayDataset, Dataset

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm")
SPLITS = ("train", "val", "valid", "validation", "test")
#: Statistics of ImageNet, which most pretrained networks expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: Part of a cache's name; another one where images are decoded in another way.
_DECODER = 2

PathLike = Union[str, "os.PathLike[str]"]
Parts = tuple[str, ...]


class Image(NamedTuple):
    """An image that is not read yet: where it stands, its bytes, and the file that changes when it does."""

    name: str
    split: str
    label: str
    read: Callable[[], bytes]
    file: Path


class _Entry(NamedTuple):
    parts: Parts
    read: Callable[[], bytes]
    file: Path


def open_images(
    paths: Sequence[Path],
    split: str | None,
    cache_dir: PathLike | None,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Dataset:
    """The images of a folder, or of several zips that are one dataset; see :func:`open_dataset`."""
    source = ", ".join(map(str, paths))
    images = list_images(paths)
    if not images:
        raise FormatError(f"{source}: no images; expected [split/]class/image ({', '.join(IMAGE_SUFFIXES)})")
    # Of all splits, so that an index means the same class in each of them.
    classes = sorted({image.label for image in images})
    position = {name: i for i, name in enumerate(classes)}
    found = {image.split for image in images}
    chosen = choose_split(source, split, sorted(found - {""}), whole="" in found)
    members = [image for image in images if image.split == chosen]
    labels = [position[image.label] for image in members]
    return image_dataset(_decoded(members, cache_dir, image_size), labels, classes, mean, std, source)


def choose_split(source: str, split: str | None, named: Sequence[str], *, whole: bool) -> str:
    """The split to read, "" for a source without any.

    Args:
        split: the one asked for. named: those that the source has. whole: it has data of no split.

    Raises:
        ConfigError: it is not there, or none was asked for and there are several.
    """
    if split is None and (whole or len(named) == 1):
        return "" if whole else named[0]
    if split is not None and split in named:
        return split
    if not named:
        raise ConfigError(
            f"{source}: no split {split!r}, as these data have no splits; leave split out (None) to read them all"
        )
    there = ", ".join(map(repr, named))
    wanted = "several splits" if split is None else f"no split {split!r}"
    raise ConfigError(f"{source}: {wanted} (there: {there}); name one of them (split=, --split)")


def split_in_name(path: Path) -> str:
    """The split that a folder is named as, or that a file's name has as a word (``cifar100-train-a.zip``)."""
    words = [path.resolve().name] if path.is_dir() else re.split(r"[^a-z]+", path.stem.lower())
    named = {word for word in words if word in SPLITS}
    return named.pop() if len(named) == 1 else ""


# --- what is there ----------------------------------------------------------------------------------------


def list_images(paths: Sequence[Path]) -> list[Image]:
    """All images of the paths with their splits ("" where there is none) and classes.

    Raises:
        FormatError: a damaged zip, an image in no class folder, a class folder without images, or split
            folders that do not stand side by side at the root.
    """
    images: list[Image] = []
    for path in paths:
        entries, folders = _folder_entries(path) if path.is_dir() else _zip_entries(path)
        images += _laid_out(path, entries, folders)
    splits = {image.split for image in images}
    if "" in splits and len(splits) > 1:
        odd = next(image for image in images if not image.split)
        known = ", ".join(map(repr, sorted(splits - {""})))
        raise FormatError(
            f"{odd.file}: {odd.name} lies in no split though others do ({known}); move or remove it"
        )
    return images if paths[0].is_dir() else sorted(images, key=lambda image: image.name)


def _hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _folder_entries(root: Path) -> tuple[list[_Entry], set[Parts]]:
    entries: list[_Entry] = []
    folders: set[Parts] = set()
    for at, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not _hidden(name)]
        parent = Path(at).relative_to(root).parts
        folders |= {(*parent, name) for name in below}
        for name in names:
            if not _hidden(name):
                file = Path(at, name)
                entries.append(_Entry((*parent, name), file.read_bytes, file))
    return sorted(entries, key=lambda entry: entry.parts), folders


def _zip_entries(path: Path) -> tuple[list[_Entry], set[Parts]]:
    try:
        archive = zipfile.ZipFile(path)
        infos = archive.infolist()
    except Exception as error:  # damaged tables raise many kinds
        raise FormatError(f"{path}: damaged or no zip file ({error}); copy it again") from error
    entries: list[_Entry] = []
    folders: set[Parts] = set()
    for info in infos:
        parts = tuple(part for part in info.filename.split("/") if part not in ("", "."))
        if not parts or any(map(_hidden, parts)):
            continue
        inner = parts if info.is_dir() else parts[:-1]
        if inner not in folders:
            folders |= {inner[:depth] for depth in range(1, len(inner) + 1)}
        if not info.is_dir():
            entries.append(_Entry(parts, functools.partial(archive.read, info), path))
    return entries, folders


def _laid_out(path: Path, entries: Sequence[_Entry], folders: set[Parts]) -> Iterator[Image]:
    """Images of one source; split and class are read from the root, as torchvision's ImageFolder does."""
    found = [entry for entry in entries if entry.parts[-1].lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        return
    top = _wrappers(found, folders)
    nested = any(e.parts[top] in SPLITS and len(e.parts) - top > 2 for e in found)
    outer = "" if nested else split_in_name(path)
    used: set[Parts] = set()
    for entry in found:
        *above, _ = entry.parts[top:]
        inside = nested and bool(above) and above[0] in SPLITS
        name = "/".join(entry.parts)
        if len(above) < 1 + inside:
            raise FormatError(f"{path}: {name} lies in no class folder; expected [split/]class/image")
        label, below = above[inside], above[inside + 1 :]
        if set(below) & set(SPLITS) or (below and label in SPLITS):
            raise FormatError(
                f"{path}: {name} has the name of a split below the root; expected [split/]class/image"
            )
        used.add(entry.parts[: top + inside + 1])
        yield Image(name, above[0] if inside else outer, label, entry.read, entry.file)
    level = top + nested + 1
    classes = {f for f in folders if len(f) == level and (not nested or f[top] in SPLITS)}
    if not nested and {f[top] for f in classes} <= set(SPLITS):
        raise FormatError(
            f"{path}: split folders hold images, but no class folders; expected split/class/image"
        )
    if empty := sorted(classes - used):
        raise FormatError(
            f"{path}: class folder {'/'.join(empty[0])} holds no images that can be read "
            f"({', '.join(IMAGE_SUFFIXES)}); convert them or remove the folder"
        )


def _wrappers(found: Sequence[_Entry], folders: set[Parts]) -> int:
    """Number of folders that wrap everything, as archives often have them: they are neither split nor class."""
    top = 0
    while all(len(entry.parts) - top > 2 for entry in found):
        names = {folder[top] for folder in folders if len(folder) > top}
        if len(names) != 1 or names & set(SPLITS):
            break
        top += 1
    return top


# --- pixels -----------------------------------------------------------------------------------------------


def _decoded(members: Sequence[Image], cache_dir: PathLike | None, image_size: int | None) -> np.ndarray:
    """(N, H, W, 3) uint8; read from the cache where it is there, and written to it."""
    target = None if cache_dir is None else Path(cache_dir) / f"images-{_key(members, image_size)}.npy"
    if target is not None and target.exists():
        try:
            cached: np.ndarray = np.load(target, mmap_mode="r")
            if len(cached) == len(members):
                return cached
        except (ValueError, OSError) as error:
            _log.warning("%s is damaged (%s); decoding again", target, error)
    first = _decode_image(members[0], image_size)
    values = np.empty((len(members), *first.shape), dtype=np.uint8)
    for i, member in enumerate(members):
        image = first if i == 0 else _decode_image(member, image_size)
        if image.shape != first.shape:
            raise ConfigError(
                f"{member.name} is {image.shape[:2]} but others are {first.shape[:2]}; give one size for all "
                "(image_size=, --image-size)"
            )
        values[i] = image
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        with open(partial, "wb") as stream:
            np.save(stream, values)
        os.replace(partial, target)
    return values


def _key(members: Sequence[Image], image_size: int | None) -> str:
    """Names the decoded form of exactly these images: another one when a file is replaced."""
    digest = hashlib.sha256(f"{_DECODER} {image_size}".encode())
    for file in dict.fromkeys(member.file for member in members):
        try:
            stamp = file.stat()
        except OSError as error:
            raise FormatError(f"{file} cannot be read ({error}); replace or remove it") from error
        digest.update(f"\n{file.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode())
    for member in members:
        digest.update(f"\n{member.name}".encode())
    return digest.hexdigest()[:16]


def _cause(error: Exception) -> str:
    """What a decoder says, without the object that it was given."""
    return re.sub(r"\s*<[^>]* object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__


def _decode_image(member: Image, image_size: int | None) -> np.ndarray:
    try:
        from PIL import Image as PILImage
    except ImportError as error:
        raise MissingDependencyError("reading images needs Pillow: pip install pillow") from error
    try:
        content = member.read()
    except Exception as error:  # zipfile raises many kinds: damaged, encrypted, compressed in an unknown way
        raise FormatError(
            f"{member.file}: {member.name} is damaged ({error}); copy the file again"
        ) from error
    try:
        image = _eight_bit(PILImage.open(io.BytesIO(content)), member.name)
    except FormatError:
        raise
    except Exception as error:  # the decoders raise many kinds, one of them for images of absurd size
        raise FormatError(
            f"{member.name} is no readable image ({_cause(error)}); replace or remove it"
        ) from error
    if image_size is not None and image.size != (image_size, image_size):
        factor = image_size / min(image.size)
        size = (max(image_size, round(image.width * factor)), max(image_size, round(image.height * factor)))
        image = image.resize(size, PILImage.Resampling.BILINEAR)
        left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image)


def _eight_bit(image: Any, name: str) -> Any:
    """RGB; 16-bit grey levels are scaled from the type's range, where Pillow itself would clip them at 255."""
    from PIL import Image as PILImage

    if image.mode == "F":
        raise FormatError(f"{name} holds floating-point pixels of unknown range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.int64)  # mode "I" too comes from 16-bit files
    if values.min() < 0 or values.max() > 65535:
        raise FormatError(f"{name} has pixels outside 0..65535; save it with 8 or 16 bits")
    return PILImage.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def image_dataset(
    values: np.ndarray,
    labels: Any,
    classes: Sequence[str],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    source: str,
) -> ArrayDataset:
    """uint8 images (N, H, W, C), normalised as (value / 255 - mean) / std.

    Raises:
        ConfigError: ``mean`` or ``std`` of another length than there are channels.
    """
    channels = values.shape[-1]
    for option, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != channels:
            raise ConfigError(
                f"{source}: {option}= has {len(given)} values but the images have {channels} channels"
            )
    default = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    middle, spread = (
        torch.tensor([float(v) for v in (usual if given is None else given)]).view(-1, 1, 1)
        for given, usual in zip((mean, std), default, strict=True)
    )
    return ArrayDataset(
        values,
        labels,
        classes,
        "image",
        scale=1.0 / (255.0 * spread),
        offset=-255.0 * middle,
        channels_last=True,
    )
