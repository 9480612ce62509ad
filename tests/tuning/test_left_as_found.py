"""What training and re-estimation borrow they give back; batches and names that once went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.data import ArrayDataset, Loader
from sigmab_plugin.errors import TrainingError
from sigmab_plugin.tuning import finetune, reestimate_batchnorm

from .nets import QUICK, dense, loader, same, samples, state, tree


def vectors(count: int) -> TensorDataset:
    images, targets = samples(count)
    return TensorDataset(images.flatten(1), targets)


def perceptron(*, norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(36, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 4)
    )


def own_loader(count: int, *, drop_last: bool = False) -> Loader:
    x, y = vectors(count).tensors
    data = ArrayDataset(x.numpy(), y.numpy(), list("abcd"), "features")
    return Loader(data, batch_size=16, shuffle=True, drop_last=drop_last)


def test_no_gradients_are_left_behind_and_earlier_ones_come_back() -> None:
    net = tree()
    finetune(net, loader(), epochs=1, recipe=QUICK, progress=False)
    assert all(parameter.grad is None for parameter in net.parameters())
    first, *others = net.parameters()
    first.grad = torch.full_like(first, 7.0)
    finetune(net, loader(), epochs=1, recipe=QUICK, progress=False)
    assert torch.equal(first.grad, torch.full_like(first, 7.0))
    assert all(parameter.grad is None for parameter in others)


def test_the_generator_of_a_loader_keeps_its_state() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    batches = DataLoader(vectors(64), batch_size=16, shuffle=True, generator=generator)
    net = perceptron()
    finetune(net, batches, epochs=2, recipe=QUICK, progress=False)
    assert torch.equal(generator.get_state(), before)
    reestimate_batchnorm(net, batches)
    assert torch.equal(generator.get_state(), before)


def test_a_loader_keeps_its_epoch() -> None:
    batches = own_loader(64)
    batches.set_epoch(9)
    net = perceptron()
    reestimate_batchnorm(net, batches)
    assert batches.epoch == 9
    finetune(net, batches, epochs=2, recipe=QUICK, progress=False)
    assert batches.epoch == 9


@pytest.mark.parametrize("kind", ["torch", "own"])
def test_a_last_batch_of_one_sample_is_named_before_the_first_step(kind: str) -> None:
    batches = DataLoader(vectors(65), batch_size=16) if kind == "torch" else own_loader(65)
    net = perceptron()
    weights = net[0].weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingError, match=r"last training batch holds one sample.*'1'.*drop_last=True"):
        finetune(net, batches, epochs=1, recipe=QUICK, progress=False)
    assert torch.equal(net[0].weight, weights)
    assert not net[1]._forward_pre_hooks
    finetune(perceptron(norm=False), batches, epochs=1, recipe=QUICK, progress=False)
    finetune(net, own_loader(65, drop_last=True), epochs=1, recipe=QUICK, progress=False)


def test_a_batch_of_one_sample_is_named_when_it_comes() -> None:
    x, y = vectors(17).tensors
    with pytest.raises(TrainingError, match=r"cannot train on a batch of one sample.*drop_last=True"):
        finetune(perceptron(), [(x[:16], y[:16]), (x[16:], y[16:])], epochs=1, recipe=QUICK, progress=False)


@pytest.mark.parametrize("make", [tree, dense])
def test_images_train_on_one_sample(make: type[nn.Module]) -> None:
    """A channel has a value per pixel, so BatchNorm has its variance."""
    history = finetune(make(), loader(17), epochs=1, recipe=QUICK, progress=False)
    assert history.last.samples == 17


def test_a_point_in_the_name_of_a_log_is_kept(tmp_path: Path) -> None:
    for name in ("lr0.05", "lr0.01", "run.json", "log.csv"):
        finetune(perceptron(), own_loader(32), epochs=1, recipe=QUICK, log=tmp_path / name, progress=False)
    stems = ("log", "lr0.01", "lr0.05", "run")
    expected = sorted(f"{stem}.{kind}" for stem in stems for kind in ("csv", "json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_the_packages_loader_goes_by_its_own_seed() -> None:
    """As the documentation says: ``seed`` of the call alone changes nothing without dropout."""
    results = []
    for seed, order in ((0, 0), (1, 0), (0, 1)):
        net, batches = perceptron(), own_loader(64)
        batches.seed = order
        finetune(net, batches, epochs=1, recipe=QUICK, seed=seed, progress=False)
        results.append(state(net))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])
