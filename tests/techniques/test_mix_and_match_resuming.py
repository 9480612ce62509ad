"""Mix-and-Match's search is a function of seed and epoch: orders of data, resuming, NaN scores, frozen layers."""

from __future__ import annotations

import copy
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.data import ArrayDataset, Loader
from sigmab_plugin.errors import TrainingError
from sigmab_plugin.techniques.legonet import LegoNetConfig, expand_into, finetune_codebook, pack
from sigmab_plugin.techniques.mix_and_match import (
    MixAndMatchConfig,
    Run,
    SearchResult,
    finetune_masked,
    search,
)
from sigmab_plugin.techniques.mix_and_match.results import choose, rank

from .mix_and_match_models import IMAGES, SmallResNet, accuracy, batches, train

DATA = batches(8)
TRAIN, VALIDATION = DATA[:6], DATA[6:]
IMAGES_TRAIN = torch.cat([inputs for inputs, _ in TRAIN])
LABELS_TRAIN = torch.cat([targets for _, targets in TRAIN])
CONFIG = MixAndMatchConfig(
    finetune_epochs=1,
    scores=("gradient",),
    criteria=("snip", "grasp"),
    strategies=("alpha_0.3", "alpha_0.7", "max"),
    small_layer_parameters=1000,
)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return train(SmallResNet(), TRAIN, 6)


def shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES_TRAIN, LABELS_TRAIN), batch_size=16, shuffle=True)


def own_loader() -> Loader:
    dataset = ArrayDataset(IMAGES_TRAIN.numpy(), LABELS_TRAIN.numpy(), list("abcd"), "image")
    return Loader(dataset, batch_size=16, shuffle=True, augment=add_noise)


def add_noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


class Recording(Loader):
    """Notes the first samples of every pass."""

    def __init__(self) -> None:
        source = own_loader()
        super().__init__(source.dataset, batch_size=16, shuffle=True)
        self.seen: list[list[int]] = []

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        self.seen.append(self.order()[:8].tolist())
        return super().__iter__()


class StopError(RuntimeError):
    pass


class Interrupted:
    """Validation that is stopped at one of its calls."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, net: nn.Module) -> float:
        self.left -= 1
        if not self.left:
            raise StopError
        return accuracy(net, VALIDATION)


def run_search(
    model: nn.Module, data: Iterable[Any], config: MixAndMatchConfig = CONFIG, **options: Any
) -> SearchResult:
    options.setdefault("validate", lambda net: accuracy(net, VALIDATION))
    return search(model, config, example_inputs=torch.randn(IMAGES), train_data=data, **options)


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_time(result: SearchResult) -> list[dict[str, object]]:
    return [{**run.to_dict(), "seconds": 0} for run in result.runs]


@pytest.mark.parametrize("make", [shuffled, own_loader])
def test_an_interrupted_search_equals_an_uninterrupted_one(
    trained: nn.Module, tmp_path: Path, make: Any
) -> None:
    torch.manual_seed(1)
    whole = run_search(trained, make())
    data = make()
    with pytest.raises(StopError):
        run_search(trained, data, validate=Interrupted(3), folder=tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    torch.manual_seed(2)  # another process, and other training before it
    if isinstance(data, Loader):
        data.set_epoch(3)
    resumed = run_search(trained, data, folder=tmp_path)
    assert resumed.ranges == whole.ranges
    assert without_time(resumed) == without_time(whole)
    assert same_state(resumed.model, whole.model)


def test_a_finished_structured_search_on_a_shuffled_loader_is_read_back(
    trained: nn.Module, tmp_path: Path
) -> None:
    tp = pytest.importorskip("torch_pruning")
    options: dict[str, Any] = {
        "config": CONFIG,
        "validate": lambda net: accuracy(net, VALIDATION),
        "train_data": shuffled(),
        "structured": True,
        "folder": tmp_path,
    }
    example = torch.randn(IMAGES)
    first = tp.pruner.MixAndMatchPruner(trained, example, **options)
    first.step()
    for seed in range(3):
        torch.manual_seed(seed)
        again = tp.pruner.MixAndMatchPruner(trained, example, **options)
        assert same_state(again.step(), first.result.model)
        assert without_time(again.result) == without_time(first.result)


def test_ranges_are_those_that_the_search_began_with(
    trained: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_search(trained, TRAIN, calibration_data=TRAIN[:1], folder=tmp_path)
    stored = json.loads((tmp_path / "search.json").read_text())["ranges"]
    assert stored == first.to_dict()["ranges"]
    (tmp_path / "runs" / "gradient-max.json").unlink()
    with caplog.at_level(logging.WARNING):
        again = run_search(trained, TRAIN, calibration_data=TRAIN[3:5], folder=tmp_path)
    assert "other ranges" in caplog.text
    assert again.ranges == first.ranges
    sparsities = [{run.key: run.sparsity for run in result.runs} for result in (first, again)]
    assert sparsities[0] == sparsities[1]


def test_a_rerun_does_not_displace_the_best(
    trained: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.replace(max_drop=1.0)  # the sparsest wins: the last of the plan
    first = run_search(trained, TRAIN, config, folder=tmp_path)
    assert first.chosen.strategy == "max"
    for workers in (1, 2):
        (tmp_path / "runs" / "gradient-alpha_0.3.json").unlink()
        with caplog.at_level(logging.WARNING):
            again = run_search(trained, TRAIN, config.replace(workers=workers), folder=tmp_path)
        assert "gone" not in caplog.text
        assert json.loads((tmp_path / "best.json").read_text()) == {"run": "gradient-max"}
        assert same_state(again.model, first.model)


def test_every_epoch_has_an_order_of_its_own(trained: nn.Module) -> None:
    expected = []
    for epoch in range(3):
        reference = Recording()
        reference.set_epoch(epoch)
        expected.append(reference.order()[:8].tolist())
    masked, codebook = Recording(), Recording()
    masked.set_epoch(7)
    codebook.set_epoch(7)
    finetune_masked(copy.deepcopy(trained), {}, masked, MixAndMatchConfig(finetune_epochs=3))
    finetune_codebook(pack(trained, LegoNetConfig(codebook_size=8)), trained, codebook, epochs=3)
    assert masked.seen == codebook.seen == expected
    assert len({tuple(order) for order in expected}) == 3


def test_fine_tuning_is_a_function_of_the_seed_and_leaves_the_generators() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 4))
    packed = pack(net, LegoNetConfig(codebook_size=8))
    other = pack(net, LegoNetConfig(codebook_size=8, seed=1))

    def masked(seed: int, data: Any) -> nn.Module:
        tuned = copy.deepcopy(net)
        finetune_masked(tuned, {}, data, MixAndMatchConfig(finetune_epochs=2, seed=seed))
        return tuned

    def codebook(seed: int, data: Any) -> nn.Module:
        return expand_into(finetune_codebook((packed, other)[seed], net, data, epochs=2), net)

    for finetune in (masked, codebook):
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(10 + len(results))
            random.seed(len(results))
            before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
            results.append(finetune(seed, shuffled()))
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
        assert same_state(results[0], results[1])
        assert not same_state(results[0], results[2])


def test_threads_do_not_share_an_epoch(trained: nn.Module) -> None:
    config = CONFIG.replace(finetune_epochs=3)
    loader = own_loader()
    one = run_search(trained, loader, config)
    two = run_search(trained, loader, config.replace(workers=3))
    assert without_time(one) == without_time(two)
    assert same_state(one.model, two.model)


def test_nan_is_no_score(trained: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Run("magnitude", "min", 0.5, 0.9, 0.0), Run("magnitude", "max", 0.9, math.nan, 0.0)
    for runs in ([good, bad], [bad, good]):
        assert rank(runs) == (good, bad)
        for drop in (None, 0.01, 1.0):
            assert choose(runs, 0.9, drop) is good
    assert choose([bad], 0.9, None) is bad

    def validate(net: nn.Module) -> float:
        zeros = sum(int((p == 0).sum()) for p in net.parameters())
        return math.nan if zeros > 0.7 * sum(p.numel() for p in net.parameters()) else 0.5

    config = CONFIG.replace(finetune_epochs=0, strategies=("max", "min"), sparsities=(0.5, 0.9))
    with caplog.at_level(logging.WARNING):
        result = run_search(trained, TRAIN, config, validate=validate, folder=tmp_path)
    assert result.chosen.strategy == "min"
    assert math.isnan(result.runs[-1].validation)
    assert [line for line in caplog.messages if "NaN" in line] == [
        "mix_and_match: the validation score of gradient-max is NaN; ranked last, never chosen before another"
    ]
    (spread,) = result.spreads()
    assert (spread.runs, spread.mean, spread.best) == (1, 0.5, 0.5)
    again = run_search(trained, TRAIN, config, validate=validate, folder=tmp_path)
    assert again.chosen.strategy == "min"
    nothing = run_search(trained, TRAIN, config, validate=lambda net: math.nan)
    assert math.isnan(nothing.spreads()[0].mean)


@pytest.mark.parametrize("structured", [False, True])
def test_frozen_layers_stay_frozen(trained: nn.Module, structured: bool) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = copy.deepcopy(trained)
    model.layer3.requires_grad_(False)  # type: ignore[union-attr, operator]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    pruner = tp.pruner.MixAndMatchPruner(
        model,
        torch.randn(IMAGES),
        config=CONFIG.replace(strategies=("alpha_0.3",)),
        validate=lambda net: accuracy(net, VALIDATION),
        train_data=TRAIN,
        structured=structured,
    )
    result = pruner.step()
    assert {name: p.requires_grad for name, p in result.named_parameters()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    if not structured:
        name = "layer3.conv2.weight"
        mask = pruner.result.masks[name]
        now, before = result.get_parameter(name), model.get_parameter(name)
        assert torch.equal(now, before * mask)
        assert not torch.equal(result.fc.weight, model.fc.weight)  # type: ignore[union-attr]


def test_nothing_to_train_is_said(trained: nn.Module) -> None:
    model = copy.deepcopy(trained).requires_grad_(False)
    with pytest.raises(TrainingError, match="every parameter is frozen"):
        run_search(model, TRAIN)
    pruned = run_search(model, TRAIN, CONFIG.replace(finetune_epochs=0))
    assert pruned.masks
    assert not any(parameter.requires_grad for parameter in pruned.model.parameters())
