"""A checkpoint is continued by the run that wrote it and by no other."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sigmab_plugin.data import ArrayDataset, Loader
from sigmab_plugin.errors import FormatError
from sigmab_plugin.tuning import History, finetune, load_weights
from sigmab_plugin.tuning.identity import weights_digest

from .nets import QUICK, dense, loader, same, samples, state, tree

OPTIONS: dict[str, Any] = {"epochs": 2, "recipe": QUICK, "progress": False}
BEFORE_DIGESTS = ("initial_weights", "teacher_weights", "first_samples")


def batches(shift: int = 0) -> list[Any]:
    images, targets = samples(64)
    return [(images[i : i + 16], (targets[i : i + 16] + shift) % 4) for i in range(0, 64, 16)]


def own_loader(shift: int = 0, *, shuffle: bool = True) -> Loader:
    images, targets = samples(64)
    data = ArrayDataset(images.numpy(), (targets.numpy() + shift) % 4, list("abcd"), "image")
    return Loader(data, batch_size=16, shuffle=shuffle, drop_last=True)


def first_epoch(folder: Path, **options: Any) -> nn.Module:
    net = tree()
    history = finetune(net, loader(), checkpoint_dir=folder, max_seconds=0.0, **{**OPTIONS, **options})
    assert not history.complete
    return net


def without_digests(path: Path) -> None:
    """The checkpoint as earlier releases wrote it."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sigmab"])
    for key in BEFORE_DIGESTS:
        header["scalars"]["run"].pop(key, None)
    save_file(load_file(path), path, metadata={"sigmab": json.dumps(header, sort_keys=True)})


@pytest.mark.parametrize("finished", [True, False])
def test_another_network_of_the_same_shape_is_refused(tmp_path: Path, finished: bool) -> None:
    finetune(tree(), loader(), checkpoint_dir=tmp_path, max_seconds=None if finished else 0.0, **OPTIONS)
    other = tree(seed=1)
    before = state(other)
    with pytest.raises(
        FormatError, match=r"started with other weights; to start over give another folder .*, delete"
    ):
        finetune(other, loader(), checkpoint_dir=tmp_path, **OPTIONS)
    assert same(state(other), before)


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    recipe = QUICK.replace(distillation_weight=1.0)
    first_epoch(tmp_path, recipe=recipe, teacher=dense())
    options = {**OPTIONS, "recipe": recipe, "checkpoint_dir": tmp_path}
    with pytest.raises(FormatError, match="started with another teacher; to start over give another folder"):
        finetune(tree(), loader(), teacher=dense(seed=1), **options)
    assert finetune(tree(), loader(), teacher=dense(), **options).complete


@pytest.mark.parametrize("make", [batches, own_loader])
def test_other_data_is_refused(tmp_path: Path, make: Any) -> None:
    options = {**OPTIONS, "checkpoint_dir": tmp_path}
    finetune(tree(), make(), **options)
    with pytest.raises(FormatError, match="started with other data; to start over give another folder"):
        finetune(tree(), make(1), **options)
    with pytest.raises(FormatError, match="started with other weights and other data"):
        finetune(tree(seed=1), make(1), **options)
    assert finetune(tree(), make(), **options).complete


def test_the_look_at_the_data_changes_no_training(tmp_path: Path) -> None:
    kept, alone = tree(dropout=0.2), tree(dropout=0.2)
    finetune(kept, own_loader(), checkpoint_dir=tmp_path, **OPTIONS)
    finetune(alone, own_loader(), **OPTIONS)
    assert same(state(kept), state(alone))


def test_a_loop_over_the_same_network_goes_on(tmp_path: Path) -> None:
    """It hands over what the run left, not the network of the start; a fresh one is still accepted after it."""
    whole, net = tree(), tree()
    options = {**OPTIONS, "epochs": 3}
    finetune(whole, loader(), **options)
    history: History | None = None
    calls = 0
    while history is None or not history.complete:
        history = finetune(net, loader(), checkpoint_dir=tmp_path, max_seconds=0.0, **options)
        calls += 1
        if calls == 2:
            net = tree()
    assert calls == 3
    assert same(state(net), state(whole))


def test_the_best_and_the_last_weights_are_the_runs_own(tmp_path: Path) -> None:
    options = {**OPTIONS, "epochs": 4, "val_loader": loader(16, seed=1), "checkpoint_dir": tmp_path}
    net = tree()
    assert finetune(net, loader(), **options).best_epoch != 4
    last = state(net)
    for name in ("best", "last"):
        again = tree(seed=3)
        load_weights(tmp_path / f"{name}.safetensors", again)
        assert finetune(again, loader(), **options).complete
        assert same(state(again), last)


def test_a_checkpoint_of_an_earlier_release_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, net = tree(), tree(seed=1)
    finetune(whole, loader(), **OPTIONS)
    first_epoch(tmp_path)
    without_digests(tmp_path / "last.safetensors")
    with caplog.at_level(logging.INFO):
        finetune(net, loader(), checkpoint_dir=tmp_path, **OPTIONS)
    assert same(state(net), state(whole))
    assert sum("earlier release" in record.getMessage() for record in caplog.records) == 1
    with safe_open(tmp_path / "last.safetensors", framework="pt") as file:
        run = json.loads(file.metadata()["sigmab"])["scalars"]["run"]
    assert not set(BEFORE_DIGESTS) & set(run)  # what it started from is still not known


def test_the_log_is_completed_after_a_death_between_checkpoint_and_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = History.write

    def die(self: History, path: Any) -> None:
        if len(self.records) == 2:
            raise KeyboardInterrupt
        write(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(History, "write", die)
        with pytest.raises(KeyboardInterrupt):
            finetune(tree(), loader(), checkpoint_dir=tmp_path, **OPTIONS)
    assert len(json.loads((tmp_path / "log.json").read_text())["records"]) == 1
    history = finetune(tree(), loader(), checkpoint_dir=tmp_path, **OPTIONS)
    assert json.loads((tmp_path / "log.json").read_text()) == history.to_dict()
    assert history.complete


def test_digest_of_weights() -> None:
    weights = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor(3),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    digest = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == digest
    transposed = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert weights_digest({**weights, "a": transposed}) == digest
    for key, value in (
        ("a", weights["a"].view(3, 2)),
        ("a", weights["a"].double()),
        ("a", weights["a"] + 1e-6),
        ("d", torch.empty(0)),
    ):
        assert weights_digest({**weights, key: value}) != digest
