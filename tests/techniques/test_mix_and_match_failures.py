"""Mix-and-Match's fine-tuning that diverges or cannot go on, and folders and loaders around a search."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.errors import FormatError, TrainingError
from sigmab_plugin.techniques.mix_and_match import (
    MixAndMatchConfig,
    Run,
    SearchResult,
    finetune_masked,
    search,
)
from sigmab_plugin.techniques.mix_and_match.results import choose

INPUTS = torch.linspace(-1, 1, 33 * 16).reshape(33, 16).sin()
TARGETS = torch.arange(33) % 4
DATA = [(INPUTS, TARGETS)]
CONFIG = MixAndMatchConfig(
    finetune_epochs=2,
    criteria=("magnitude",),
    scores=("magnitude",),
    strategies=("min", "max"),
    small_layer_parameters=0,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


def run_search(config: MixAndMatchConfig = CONFIG, data: Any = DATA, **options: Any) -> SearchResult:
    options.setdefault("validate", lambda net: float((net(INPUTS).argmax(1) == TARGETS).float().mean()))
    return search(network(), config, example_inputs=INPUTS, train_data=data, **options)


def test_a_loss_that_is_not_finite_ends_fine_tuning() -> None:
    with pytest.raises(TrainingError, match=r"not finite at epoch 2, step 1; try a lower finetune_lr"):
        finetune_masked(network(), {}, DATA, CONFIG.replace(finetune_lr=1e30))
    with pytest.raises(TrainingError, match="weights are not finite"):
        finetune_masked(
            network(),
            {},
            DATA,
            CONFIG.replace(finetune_lr=1e30, finetune_epochs=1),
            loss_fn=lambda logits, targets: 1e30 * nn.functional.cross_entropy(logits, targets),
        )


def test_a_run_that_diverged_is_never_chosen(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    first = iter([math.nan])

    class OnceNaN(list[Any]):
        """Holds NaN on its first pass, which is that of the first run."""

        def __iter__(self) -> Iterator[Any]:
            factor = next(first, 1.0)
            return iter([(inputs * factor, targets) for inputs, targets in DATA])

    with caplog.at_level(logging.WARNING):
        result = run_search(data=OnceNaN(), calibration_data=DATA, folder=tmp_path)
    lines = [line for line in caplog.messages if "magnitude-min" in line]
    assert len(lines) == 1
    assert "failed and is never chosen: the loss of fine-tuning is not finite at epoch 1, step 1" in lines[0]
    assert result.chosen.strategy == "max"
    assert math.isnan(result.runs[-1].validation)
    assert result.runs[-1].sparsity > 0
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())
    with caplog.at_level(logging.WARNING):
        again = run_search(calibration_data=DATA, folder=tmp_path)
    assert again.chosen.strategy == "max"


def test_a_search_in_which_everything_diverged_has_no_result(tmp_path: Path) -> None:
    for _ in range(2):  # the second reads the runs from the folder
        with pytest.raises(TrainingError, match="every run diverged"):
            run_search(CONFIG.replace(finetune_lr=1e30), folder=tmp_path)


def test_a_last_batch_of_one_sample_is_refused_with_the_remedy() -> None:
    loader: Any = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=8)
    for data in (loader, list(loader)):
        with pytest.raises(TrainingError, match="drop_last=True"):
            run_search(data=data)
    steps = 0

    def count(module: nn.Module, *_: Any) -> None:
        nonlocal steps
        steps += module.training

    net = network()
    net[0].register_forward_hook(count)  # type: ignore[operator]
    with pytest.raises(TrainingError, match="BatchNorm '1'"):
        finetune_masked(net, {}, loader, CONFIG)
    assert steps == 1  # seen ahead, not after an epoch


def test_a_search_leaves_the_loader_and_no_gradients() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    train, calibration = (
        DataLoader(TensorDataset(INPUTS[:32], TARGETS[:32]), batch_size=8, shuffle=True, generator=generator)
        for generator in generators
    )
    before = [generator.get_state() for generator in generators]
    result = run_search(data=train, calibration_data=calibration)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))
    assert all(parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize("name", ["search.json", "runs/magnitude-max.json", "best.json", "best.safetensors"])
@pytest.mark.parametrize("content", [b"{", b"7", b"\xff"])
def test_a_damaged_folder_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    config = CONFIG.replace(finetune_epochs=0)
    run_search(config, folder=tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name} is damaged.*; (delete|give)"):
        run_search(config, folder=tmp_path)


def test_a_loss_of_exactly_max_drop_is_within_it() -> None:
    runs = [Run("m", "max", 0.9, 47 / 100, 0.0), Run("m", "min", 0.1, 52 / 100, 0.0)]
    assert 47 / 100 < 52 / 100 - 0.05  # by rounding
    assert choose(runs, 52 / 100, 0.05).strategy == "max"
    assert choose(runs, 52 / 100, 0.049).strategy == "min"
