from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sigmab_plugin.data import open_dataset, splits_of
from sigmab_plugin.errors import ConfigError, FormatError

Image = pytest.importorskip("PIL.Image")


def _write_images(
    root: Path, *, size: tuple[int, int] = (6, 6), splits: tuple[str, ...] = ("train", "test")
) -> None:
    generator = np.random.default_rng(0)
    for split in splits:
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def _zip(folder: Path, target: Path, pattern: str = "**/*.png") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.glob(pattern)):
            archive.write(file, file.relative_to(folder).as_posix())
    return target


def test_folder_and_zip_give_the_same_samples(tmp_path: Path) -> None:
    _write_images(tmp_path / "data")
    folder = open_dataset(tmp_path / "data", split="train")
    archive = open_dataset(_zip(tmp_path / "data", tmp_path / "data.zip"), split="train")
    assert folder.classes == archive.classes == ["cat", "dog"]
    assert folder.kind == "image"
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for a, b in zip(folder, archive, strict=True):
        assert torch.equal(a[0], b[0])
        assert a[1] == b[1]


def test_pixels_are_normalised_per_channel(tmp_path: Path) -> None:
    _write_images(tmp_path, splits=("train",))
    dataset = open_dataset(tmp_path, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    pixels = np.asarray(Image.open(tmp_path / "train/cat/0.png"), dtype=np.float64) / 255
    expected = torch.tensor((pixels - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).permute(2, 0, 1).float()
    torch.testing.assert_close(dataset[0][0], expected)


@pytest.mark.parametrize("as_text", [False, True], ids=["list", "comma"])
def test_several_zips_are_one_dataset(tmp_path: Path, as_text: bool) -> None:
    _write_images(tmp_path / "data", splits=("train",))
    parts = [_zip(tmp_path / "data", tmp_path / f"{n}.zip", f"**/{n}.png") for n in range(3)]
    whole = open_dataset(_zip(tmp_path / "data", tmp_path / "whole.zip"))
    both = open_dataset(",".join(map(str, parts)) if as_text else parts)
    assert len(both) == 6
    assert torch.equal(both.batch(range(6))[0], whole.batch(range(6))[0])


def test_decoded_images_are_cached_and_a_damaged_cache_is_made_anew(tmp_path: Path, caplog) -> None:
    _write_images(tmp_path / "data", splits=("train",))
    cache = tmp_path / "cache"
    first = open_dataset(tmp_path / "data", cache_dir=cache)
    (file,) = cache.glob("*.npy")
    again = open_dataset(tmp_path / "data", cache_dir=cache)
    assert isinstance(again.values, np.memmap)
    assert torch.equal(first.batch(range(6))[0], again.batch(range(6))[0])
    del again
    file.write_bytes(b"damaged")
    repaired = open_dataset(tmp_path / "data", cache_dir=cache)
    assert "damaged" in caplog.text
    assert torch.equal(first.batch(range(6))[0], repaired.batch(range(6))[0])


def test_images_of_different_sizes_need_a_size(tmp_path: Path) -> None:
    _write_images(tmp_path, splits=("train",), size=(9, 6))
    Image.new("RGB", (5, 12)).save(tmp_path / "train/dog/tall.png")
    with pytest.raises(ConfigError, match="image_size"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, image_size=4).batch(range(7))[0].shape == (7, 3, 4, 4)


@pytest.mark.parametrize(
    ("split", "words"),
    [(None, "'test', 'train'"), ("val", "no split 'val'")],
    ids=["none given", "not there"],
)
def test_the_split_must_be_clear(tmp_path: Path, split: str | None, words: str) -> None:
    _write_images(tmp_path)
    with pytest.raises(ConfigError, match=words):
        open_dataset(tmp_path, split=split)


# --- arrays -----------------------------------------------------------------------------------------------


def test_point_clouds_in_fixed_point(tmp_path: Path) -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (5, 8, 3))
    stored = np.round(points * 32767).astype(np.int16)
    names = np.array([b"chair", b"sofa"])
    np.savez(tmp_path / "p.npz", points=stored, labels=np.array([0, 1, 1, 0, 1], np.uint8), classes=names)
    dataset = open_dataset(tmp_path / "p.npz")
    assert (dataset.kind, dataset.classes) == ("points", ["chair", "sofa"])
    (pos, batch), labels = dataset.batch([2, 3])
    assert np.abs(pos.view(2, 8, 3).numpy() - points[2:4]).max() < 1.6e-5
    assert batch.tolist() == [0] * 8 + [1] * 8
    assert labels.tolist() == [1, 0]


def test_arrays_by_split_and_their_kinds(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (4, 3, 5, 5), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", train_x=images, train_y=[0, 1, 0, 1], test_x=images[:2], test_y=[1, 0])
    train = open_dataset(tmp_path / "a.npz", split="train", mean=(0, 0, 0), std=(1, 1, 1))
    assert (len(train), train.kind) == (4, "image")
    torch.testing.assert_close(train[1][0], torch.from_numpy(images[1]).float() / 255)
    with pytest.raises(ConfigError, match="'test', 'train'"):
        open_dataset(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=generator.random((3, 7)), y=[0, 1, 2], words=["down", "go", "left"])
    features = open_dataset(tmp_path / "b.npz")
    assert (features.kind, features.classes, tuple(features[0][0].shape)) == (
        "features",
        ["down", "go", "left"],
        (7,),
    )


def test_hdf5_folders_by_split(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    points = np.random.default_rng(0).random((6, 10, 3)).astype(np.float32)
    for name, part in (("train0", slice(0, 2)), ("train1", slice(2, 4)), ("test0", slice(4, 6))):
        with h5py.File(tmp_path / f"ply_data_{name}.h5", "w") as stream:
            stream["data"], stream["label"] = points[part], np.array([[0], [1]], np.uint8)
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    train = open_dataset(tmp_path, split="train")
    assert (len(train), train.kind, train.classes) == (4, "points", ["airplane", "bathtub"])
    assert np.array_equal(train[3][0].numpy(), points[3])
    files = [tmp_path / "ply_data_train0.h5", tmp_path / "ply_data_train1.h5"]
    assert np.array_equal(open_dataset(files).labels, train.labels)
    with pytest.raises(ConfigError, match="several splits"):
        open_dataset(tmp_path)


def test_a_split_that_an_archive_lacks_is_refused(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "both.npz", train_x=np.zeros((4, 2)), train_y=[0, 1, 2, 1], test_x=[[0.0, 0]], test_y=[1]
    )
    np.savez(tmp_path / "plain.npz", x=np.zeros((2, 2)), y=[0, 1])
    np.savez(tmp_path / "clouds-test.npz", points=np.zeros((2, 4, 3), np.float32), labels=[0, 1])
    with pytest.raises(ConfigError, match=r"no split 'val' \(there: 'test', 'train'\)"):
        open_dataset(tmp_path / "both.npz", split="val")
    with pytest.raises(ConfigError, match="no splits; leave split out"):
        open_dataset(tmp_path / "plain.npz", split="train")
    with pytest.raises(ConfigError, match=r"no split 'train' \(there: 'test'\)"):
        open_dataset(tmp_path / "clouds-test.npz", split="train")
    assert len(open_dataset(tmp_path / "plain.npz")) == 2
    assert len(open_dataset(tmp_path / "clouds-test.npz", split="test")) == 2
    names = ("both", "plain", "clouds-test")
    assert [splits_of(tmp_path / f"{name}.npz") for name in names] == [("test", "train"), (), ("test",)]
    # A class that the test part lacks is counted all the same.
    assert open_dataset(tmp_path / "both.npz", split="test").classes == ["0", "1", "2"]


def test_normalisation_fits_the_channels_or_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", x=np.full((2, 4, 4, 1), 255, np.uint8), y=[0, 1])
    np.savez(tmp_path / "features.npz", x=np.zeros((2, 5)), y=[0, 1])
    assert open_dataset(tmp_path / "grey.npz")[0][0].unique().tolist() == [1.0]
    values = open_dataset(tmp_path / "grey.npz", mean=(0.5,), std=(0.25,))[0][0]
    assert values.unique().tolist() == [2.0]
    with pytest.raises(ConfigError, match="mean= has 3 values but the images have 1 channels"):
        open_dataset(tmp_path / "grey.npz", mean=(0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match="leave them out"):
        open_dataset(tmp_path / "features.npz", std=(0.5,))


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["cat", "dog"], "whole numbers"), ([0.2, 1.7], "got 0.2"), ([0, np.nan], "got nan"), ([], "2, 3")],
    ids=["strings", "fractions", "nan", "too few"],
)
def test_labels_that_are_no_class_indices_are_refused(
    tmp_path: Path, labels: list[object], words: str
) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), y=np.array(labels))
    with pytest.raises(FormatError, match=rf"a\.npz: .*{words}"):
        open_dataset(tmp_path / "a.npz")


def test_whole_labels_of_any_number_type_are_taken(tmp_path: Path) -> None:
    for kind in (np.uint8, np.float64, ">i4"):
        np.savez(tmp_path / "a.npz", x=np.zeros((3, 3), ">f4"), y=np.array([2, 0, 1], kind))
        dataset = open_dataset(tmp_path / "a.npz")
        assert dataset.labels.tolist() == [2, 0, 1]
        assert dataset[0][0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.array(["a", "b"])], ids=["empty", "text"])
def test_arrays_without_numbers_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=values, y=np.zeros(len(values), np.int64))
    with pytest.raises(FormatError, match=r"a\.npz: x holds"):
        open_dataset(tmp_path / "a.npz")


def _write_clouds(file: Path, count: int, points: int, labels: list[int]) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as stream:
        stream["data"], stream["label"] = np.zeros((count, points, 3), np.float32), np.array(labels, np.int64)


def test_hdf5_files_that_cannot_be_one_dataset_are_refused(tmp_path: Path) -> None:
    _write_clouds(tmp_path / "train0.h5", 1, 10, [0])
    _write_clouds(tmp_path / "train1.h5", 2, 12, [0, 1])
    _write_clouds(tmp_path / "test0.h5", 1, 10, [0])
    _write_clouds(tmp_path / "none.h5", 0, 10, [])
    with pytest.raises(FormatError, match=r"train0\.h5 10, train1\.h5 12"):
        open_dataset(tmp_path, split="train")
    with pytest.raises(FormatError, match=r"none\.h5: no samples"):
        open_dataset(tmp_path / "none.h5")
    _write_clouds(tmp_path / "odd.h5", 2, 10, [0])
    with pytest.raises(FormatError, match=r"odd\.h5: data must be"):
        open_dataset(tmp_path / "odd.h5")


def test_hdf5_splits_agree_on_the_classes(tmp_path: Path) -> None:
    _write_clouds(tmp_path / "train0.h5", 3, 10, [0, 1, 2])
    _write_clouds(tmp_path / "test0.h5", 2, 10, [0, 1])
    assert splits_of(tmp_path) == ("test", "train")
    assert open_dataset(tmp_path, split="test").classes == ["0", "1", "2"]
    with pytest.raises(ConfigError, match=r"no split 'val' \(there: 'test', 'train'\)"):
        open_dataset(tmp_path, split="val")
    _write_clouds(tmp_path / "clouds.h5", 2, 10, [0, 1])
    assert splits_of(tmp_path / "clouds.h5") == ()


# --- damaged input ----------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.npz"):
        open_dataset(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.h5", "a.tar"])
def test_damaged_or_unknown_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format")
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        open_dataset(tmp_path / name)


def test_truncated_archives_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "whole.npz", x=np.zeros((50, 20)), y=np.zeros(50, np.int64))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match=r"cut\.npz"):
        open_dataset(tmp_path / "cut.npz")


def test_a_damaged_image_in_a_zip_is_named(tmp_path: Path) -> None:
    _write_images(tmp_path / "data", splits=("train",))
    (tmp_path / "data/train/dog/1.png").write_bytes(b"\x89PNG damaged")
    with pytest.raises(FormatError, match=r"dog/1\.png"):
        open_dataset(_zip(tmp_path / "data", tmp_path / "data.zip"))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object), y=np.array([0, 1]))
    with pytest.raises(FormatError, match=r"objects\.npz"):
        open_dataset(tmp_path / "objects.npz")


def test_unknown_layouts_say_what_is_expected(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(FormatError, match="expected points with labels"):
        open_dataset(tmp_path / "odd.npz")
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with pytest.raises(FormatError, match="class folder"):
        open_dataset(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(FormatError, match="no images"):
        open_dataset(tmp_path / "none")


@pytest.mark.parametrize("suffix", ["npz", "zip"])
def test_damage_anywhere_is_a_format_error(tmp_path: Path, suffix: str) -> None:
    """Two bytes are turned over, everywhere in turn; the file then opens, or is refused."""
    file = tmp_path / f"a.{suffix}"
    rows, columns = np.mgrid[0:24, 0:24]
    if suffix == "npz":
        np.savez_compressed(file, x=np.sin(rows * columns), y=np.arange(24) % 2)
    else:
        Image.fromarray(np.stack([rows * 9, columns * 9, rows * columns % 251], -1).astype(np.uint8)).save(
            tmp_path / "a.bmp"
        )
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("cat", "dog"):
                archive.write(tmp_path / "a.bmp", f"{name}/0.bmp")
    whole = file.read_bytes()
    refused = 0
    for position in range(0, len(whole) - 1, 13):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        damaged[position + 1] ^= 0xFF
        file.write_bytes(damaged)
        try:
            open_dataset(file)
        except FormatError:
            refused += 1
    assert refused > len(whole) // 13 // 2
