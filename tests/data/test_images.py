"""Layouts of image folders and zips: splits, classes, what is refused, and the cache."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sigmab_plugin.data import open_dataset, splits_of
from sigmab_plugin.errors import ConfigError, FormatError

Image = pytest.importorskip("PIL.Image")
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def _write(root: Path, *names: str, value: int = 0) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(root / name)
    return root


def _zip(root: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root).as_posix())
    return target


@pytest.fixture(params=["folder", "zip"])
def source(request: pytest.FixtureRequest, tmp_path: Path):
    """Writes images of these names; path of the folder or of a zip of it."""

    def write(*names: str, target: str = "photos") -> Path:
        root = _write(tmp_path / target, *names)
        return root if request.param == "folder" else _zip(root, tmp_path / f"{target}.zip")

    return write


def test_an_index_means_the_same_class_in_every_split(source) -> None:
    path = source("train/a/0.png", "train/b/0.png", "train/c/0.png", "test/a/0.png", "test/c/0.png")
    train, test = open_dataset(path, split="train"), open_dataset(path, split="test")
    assert train.classes == test.classes == ["a", "b", "c"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [0, 2])


def test_hidden_folders_and_files_are_no_classes(source) -> None:
    path = source(
        "train/cat/0.png",
        "train/dog/0.png",
        "train/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/train/cat/0.png",
        "train/dog/._0.png",
    )
    dataset = open_dataset(path, split="train")
    assert (dataset.classes, len(dataset), splits_of(path)) == (["cat", "dog"], 2, ("train",))


@pytest.mark.parametrize("split", ["", "train/"])
def test_a_class_whose_images_cannot_be_read_is_named(source, tmp_path: Path, split: str) -> None:
    (tmp_path / f"photos/{split}cat").mkdir(parents=True)
    (tmp_path / f"photos/{split}cat/0.tif").write_bytes(b"II*")
    path = source(f"{split}dog/0.png", f"{split}fox/0.png")
    with pytest.raises(FormatError, match=f"class folder {split}cat holds no images"):
        open_dataset(path)


def test_a_split_that_is_not_there_is_refused(source) -> None:
    path = source("cat/0.png", "dog/0.png")
    for split in ("train", "test", "nonsense"):
        with pytest.raises(
            ConfigError, match=f"no split '{split}', as these data have no splits; leave split out"
        ):
            open_dataset(path, split=split)
    assert splits_of(path) == ()
    assert len(open_dataset(path)) == 2


def test_a_source_may_be_named_after_its_split(source) -> None:
    path = source("cat/0.png", "dog/0.png", target="train")
    assert splits_of(path) == ("train",)
    assert len(open_dataset(path, split="train")) == len(open_dataset(path)) == 2
    with pytest.raises(ConfigError, match=r"no split 'test' \(there: 'train'\)"):
        open_dataset(path, split="test")


def test_zips_named_after_their_splits_are_told_apart(tmp_path: Path) -> None:
    train = _zip(
        _write(tmp_path / "a", "cat/0.png", "dog/0.png", "dog/1.png"), tmp_path / "photos-train-a.zip"
    )
    test = _zip(_write(tmp_path / "b", "dog/0.png"), tmp_path / "photos-test.zip")
    assert splits_of([train, test]) == ("test", "train")
    assert open_dataset([train, test], split="train").labels.tolist() == [0, 1, 1]
    assert open_dataset([train, test], split="test").labels.tolist() == [1]


def test_folders_below_a_class_belong_to_it(source) -> None:
    path = source("train/a/sub/0.png", "train/b/sub/0.png", "train/b/1.png", "test/a/sub/0.png")
    train, test = open_dataset(path, split="train"), open_dataset(path, split="test")
    assert train.classes == test.classes == ["a", "b"]
    assert (train.labels.tolist(), len(test)) == ([0, 1, 1], 1)


@pytest.mark.parametrize(
    ("names", "splits"),
    [(("set/cat/0.png", "set/dog/0.png"), ()), (("set/train/cat/0.png", "set/train/dog/0.png"), ("train",))],
    ids=["classes", "splits"],
)
def test_a_folder_around_everything_is_no_class(
    source, names: tuple[str, ...], splits: tuple[str, ...]
) -> None:
    path = source(*names)
    assert (open_dataset(path).classes, splits_of(path)) == (["cat", "dog"], splits)


def test_classes_may_have_names_of_splits_where_no_split_could_stand(source) -> None:
    assert open_dataset(source("valid/0.png", "invalid/0.png")).classes == ["invalid", "valid"]
    assert open_dataset(source("train/valid/0.png", "train/other/0.png", target="b")).classes == [
        "other",
        "valid",
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("cat/train/0.png", "cat/test/0.png", "dog/train/0.png"), "name of a split below the root"),
        (("one/train/cat/0.png", "two/test/cat/0.png"), "name of a split below the root"),
        (("train/cat/test/0.png", "train/dog/0.png"), "name of a split below the root"),
        (("train/cat/0.png", "extra/cat/0.png"), "extra/cat/0.png lies in no split"),
        (("train/cat/0.png", "train/0.png"), "train/0.png lies in no class folder"),
        (("train/0.png", "test/0.png"), "no class folders"),
    ],
    ids=["class first", "two roots", "split in class", "beside splits", "loose", "no classes"],
)
def test_layouts_that_would_mix_splits_are_refused(source, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        open_dataset(source(*names), split="train")


# --- pixels -----------------------------------------------------------------------------------------------


def test_a_replaced_file_is_decoded_again(tmp_path: Path) -> None:
    root, cache = _write(tmp_path / "photos", "cat/0.png", "dog/0.png", value=10), tmp_path / "cache"
    stamp = os.stat(root)
    first = open_dataset(root, cache_dir=cache, **PLAIN)[0][0]
    _write(root, "cat/0.png", value=250)
    os.utime(root, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = open_dataset(root, cache_dir=cache, **PLAIN)[0][0]
    assert [round(float(image.mean() * 255)) for image in (first, again)] == [10, 250]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    levels = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    (tmp_path / "photos/cat").mkdir(parents=True)
    Image.fromarray(levels).save(tmp_path / "photos/cat/0.png")
    (tmp_path / "photos/cat/1.ppm").write_bytes(b"P5 8 8 65535\n" + levels.astype(">u2").tobytes())
    for image, _ in open_dataset(tmp_path / "photos", **PLAIN):
        assert np.abs(image[0].numpy() - levels / 65535).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", -5)], ids=["float", "negative"])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, mode: str, value: float) -> None:
    (tmp_path / "photos/cat").mkdir(parents=True)
    # Told by content, whatever the suffix.
    Image.new(mode, (8, 8), value).save(tmp_path / "photos/cat/0.png", format="TIFF")
    with pytest.raises(FormatError, match=r"cat/0\.png .*save it with 8 or 16 bits"):
        open_dataset(tmp_path / "photos")


def test_images_of_absurd_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "photos", "cat/0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(FormatError, match=r"cat/0\.png is no readable image .*bomb"):
        open_dataset(tmp_path / "photos", image_size=8)


def test_encrypted_zips_are_refused(tmp_path: Path) -> None:
    path = _zip(_write(tmp_path / "photos", "cat/0.png"), tmp_path / "photos.zip")
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1  # the flag "encrypted"
            at = content.find(signature, at + 1)
    path.write_bytes(content)
    with pytest.raises(FormatError, match="encrypted"):
        open_dataset(path)


def test_a_broken_image_is_named_without_the_decoders_objects(tmp_path: Path) -> None:
    _write(tmp_path / "photos", "cat/0.png")
    (tmp_path / "photos/cat/1.png").write_bytes(b"no image")
    with pytest.raises(FormatError, match=r"cat/1\.png is no readable image \([^<]*\); replace") as caught:
        open_dataset(tmp_path / "photos", image_size=8)
    assert "0x" not in str(caught.value)
