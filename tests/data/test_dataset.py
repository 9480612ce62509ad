from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sigmab_plugin.data import (
    ArrayDataset,
    Loader,
    cifar_augment,
    digits,
    point_cloud_augment,
    split_validation,
)
from sigmab_plugin.data.dataset import collate
from sigmab_plugin.errors import ConfigError


@pytest.fixture
def clouds() -> ArrayDataset:
    points = np.random.default_rng(0).standard_normal((30, 16, 3)).astype(np.float32)
    return ArrayDataset(points, np.arange(30) % 3, ["a", "b", "c"], "points")


def test_digits_have_a_fixed_split_that_covers_them() -> None:
    whole = digits()
    image, label = whole[0]
    assert (len(whole), tuple(image.shape), label, whole.kind) == (1797, (1, 8, 8), 0, "image")
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    parts = [digits(name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1197, 240, 360]
    taken = np.concatenate([part.indices for part in parts])
    assert np.array_equal(np.sort(taken), np.arange(1797))
    assert all(np.bincount(part.labels).min() >= 0.08 * len(part) for part in parts)
    with pytest.raises(ConfigError, match="'train', 'val' and 'test'"):
        digits("dev")


def test_batches_equal_collated_samples(clouds: ArrayDataset) -> None:
    (pos, batch), labels = clouds.batch([4, 1, 7])
    (pos2, batch2), labels2 = clouds.collate_fn([clouds[4], clouds[1], clouds[7]])
    assert torch.equal(pos, pos2)
    assert torch.equal(batch, batch2)
    assert labels.tolist() == labels2.tolist() == [1, 1, 1]


def test_a_dataset_works_with_torchs_own_loader(clouds: ArrayDataset) -> None:
    loader = torch.utils.data.DataLoader(clouds, batch_size=4, collate_fn=clouds.collate_fn)
    (pos, batch), labels = next(iter(loader))
    assert (tuple(pos.shape), batch.tolist()[::16], labels.tolist()) == ((64, 3), [0, 1, 2, 3], [0, 1, 2, 0])


@pytest.mark.parametrize("kind", ["<f4", ">f4"], ids=["little endian", "big endian"])
def test_reading_leaves_the_array_as_it_was(kind: str) -> None:
    values = np.full((4, 3), 16, dtype=kind)
    dataset = ArrayDataset(values, [0, 1, 0, 1], ["a", "b"], "features", scale=1 / 16, offset=16.0)
    for _ in range(2):
        assert dataset[1][0].tolist() == dataset.batch([1])[0][0].tolist() == [2.0, 2.0, 2.0]
    assert (values == 16).all()


@pytest.mark.filterwarnings("error")
def test_a_read_only_memory_map_is_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 3), np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    # In a process of its own: writing to the map would end it.
    code = f"""
import warnings
warnings.simplefilter("error")
import numpy as np
from sigmab_plugin.data import ArrayDataset
values = np.load({str(tmp_path / "a.npy")!r}, mmap_mode="r")
print(ArrayDataset(values, [0, 1, 0, 1], ["a", "b"], "features", offset=1.0)[2][0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[2.0, 2.0, 2.0]"), done.stderr
    assert (mapped == 1).all()


def test_order_and_augmentation_depend_on_seed_and_epoch_alone(clouds: ArrayDataset) -> None:
    augment = functools.partial(point_cloud_augment, jitter=0.01, dropout=0.5)

    def epoch(seed: int, number: int) -> list[torch.Tensor]:
        loader = Loader(clouds, batch_size=8, shuffle=True, seed=seed, augment=augment)
        loader.set_epoch(number)
        torch.rand(3)  # the global generator plays no part
        return [tensor for (pos, batch), labels in loader for tensor in (pos, batch, labels)]

    def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(epoch(1, 2), epoch(1, 2))
    assert not same(epoch(1, 2), epoch(1, 3))
    assert not same(epoch(1, 2), epoch(2, 2))


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [8, 8, 8, 6]), (True, [8, 8, 8])])
def test_every_sample_once_per_epoch(clouds: ArrayDataset, drop_last: bool, sizes: list[int]) -> None:
    loader = Loader(clouds, batch_size=8, shuffle=True, seed=0, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(labels) for _, labels in loader] == sizes
    assert np.array_equal(np.sort(loader.order()), np.arange(30))


def test_ranks_share_an_epoch_evenly(clouds: ArrayDataset) -> None:
    loaders = [Loader(clouds, batch_size=4, shuffle=True, seed=0, rank=r, world_size=4) for r in range(4)]
    orders = [loader.order() for loader in loaders]
    assert {len(order) for order in orders} == {8}
    assert set(np.concatenate(orders).tolist()) == set(range(30))


def test_validation_split_is_stratified_disjoint_and_seeded() -> None:
    labels = np.repeat(np.arange(4), [100, 40, 10, 2])
    dataset = ArrayDataset(np.arange(len(labels))[:, None], labels, list("abcd"), "features")
    train, val = split_validation(dataset, fraction=0.1, seed=3)
    assert np.bincount(val.labels).tolist() == [10, 4, 1, 1]
    assert np.array_equal(np.sort(np.concatenate([train.indices, val.indices])), np.arange(len(labels)))
    assert np.array_equal(split_validation(dataset, fraction=0.1, seed=3)[1].indices, val.indices)
    assert not np.array_equal(split_validation(dataset, fraction=0.1, seed=4)[1].indices, val.indices)
    assert val[0][1] == int(val.labels[0])


def test_crop_and_flip_only_move_pixels() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).view(2, 3, 8, 8) + 1
    kept = cifar_augment(images, torch.Generator().manual_seed(0), padding=0)
    for image, source in zip(kept, images, strict=True):
        assert torch.equal(image, source) or torch.equal(image, source.flip(-1))
    moved = cifar_augment(images, torch.Generator().manual_seed(0), padding=2)
    assert moved.shape == images.shape
    assert set(moved[0].flatten().tolist()) <= {0.0, *images[0].flatten().tolist()}


def test_cloud_augmentation_keeps_sizes_and_bounds(clouds: ArrayDataset) -> None:
    (pos, batch), _ = clouds.batch(range(30))
    generator = torch.Generator().manual_seed(0)
    scaled, index = point_cloud_augment((pos, batch), generator, scale=(0.5, 2.0), shift=0.0)
    assert torch.equal(index, batch)
    factor = (scaled / pos).view(30, -1)
    assert (factor.std(1) < 1e-4).all()
    assert 0.5 <= float(factor.min()) < float(factor.max()) <= 2.0
    dropped, _ = point_cloud_augment((pos, batch), generator, scale=(1.0, 1.0), shift=0.0, dropout=0.9)
    first = pos.view(30, 16, 3)[:, :1]
    kept = (dropped.view(30, 16, 3) == pos.view(30, 16, 3)).all(-1)
    assert ((dropped.view(30, 16, 3) == first).all(-1) | kept).all()
    assert not kept.all()


@pytest.mark.parametrize(
    "call",
    [
        lambda d: Loader(d, batch_size=0),
        lambda d: Loader(d, batch_size=2, rank=2, world_size=2),
        lambda d: split_validation(d, fraction=1.0, seed=0),
        lambda d: split_validation(
            ArrayDataset(np.zeros((1, 2)), [0], ["a"], "features"), fraction=0.5, seed=0
        ),
        lambda d: ArrayDataset(np.zeros((2, 2)), [0, 5], ["a"], "features"),
        lambda d: ArrayDataset(np.zeros((2, 2)), [0.0, 0.5], ["a"], "features"),
        lambda d: ArrayDataset(np.zeros((2, 2)), ["a", "a"], ["a"], "features"),
        lambda d: ArrayDataset(np.zeros((2, 2)), [0], ["a"], "features"),
        lambda d: ArrayDataset(np.zeros((0, 2)), [], ["a"], "video"),
        lambda d: collate([(torch.zeros(2), 0), (torch.zeros(3), 0)]),
    ],
    ids=[
        "batch size",
        "rank",
        "fraction",
        "single",
        "label",
        "fraction of a label",
        "text",
        "length",
        "kind",
        "shapes",
    ],
)
def test_bad_arguments_are_refused(clouds: ArrayDataset, call) -> None:
    with pytest.raises(ConfigError):
        call(clouds)


def test_an_empty_dataset_has_no_loader() -> None:
    with pytest.raises(ConfigError, match="empty"):
        Loader(ArrayDataset(np.zeros((0, 2)), [], ["a"], "features"), batch_size=2)
