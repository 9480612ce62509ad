"""Mix-and-Match's search: ranking, resuming, threads, structured output, the technique."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from sigmab_plugin.counting import parameter_count
from sigmab_plugin.errors import CalibrationError, ConfigError
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.mix_and_match import (
    STRATEGIES,
    MixAndMatchConfig,
    Run,
    SearchResult,
    analyse,
    layer_sparsities,
    search,
    structured_ratios,
    technique,
)
from sigmab_plugin.techniques.mix_and_match.results import choose, rank

from .mix_and_match_models import IMAGES, SmallResNet, SmallViT, accuracy, batches, small_vgg, train

DATA = batches(6)
TRAIN, VALIDATION = DATA[:4], DATA[4:]
QUICK = MixAndMatchConfig(finetune_epochs=1, scores=("magnitude", "combined"))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return train(SmallResNet(), TRAIN, 6)


def run_search(model: nn.Module, config: MixAndMatchConfig = QUICK, **options: object) -> SearchResult:
    options.setdefault("validate", lambda net: accuracy(net, VALIDATION))
    return search(model, config, example_inputs=torch.randn(IMAGES), train_data=TRAIN, **options)  # type: ignore[arg-type]


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_time(result: SearchResult) -> list[dict[str, object]]:
    return [{**run.to_dict(), "seconds": 0} for run in result.runs]


def test_search_tries_everything_and_ranks_it(trained: nn.Module) -> None:
    before = copy.deepcopy(trained)
    result = run_search(trained)
    assert same_state(trained, before)
    assert len(result.runs) == 20
    assert {run.strategy for run in result.runs} == set(STRATEGIES)
    values = [run.validation for run in result.runs]
    assert values == sorted(values, reverse=True)
    assert result.chosen.validation == values[0]
    twin = {run.key: run for run in result.runs}["magnitude-alpha_0.5"]
    assert twin.same_as == "magnitude-midpoint"
    # what is returned is what the row says
    assert accuracy(result.model, VALIDATION) == result.chosen.validation
    zeros = sum(int((~mask).sum()) for mask in result.masks.values())
    assert zeros / parameter_count(trained) == pytest.approx(result.chosen.sparsity)
    for name, mask in result.masks.items():
        assert result.model.get_parameter(name)[~mask].count_nonzero() == 0
    for spread in result.spreads():
        mine = [run.validation for run in result.runs if run.score == spread.score]
        assert spread.runs == 10
        assert spread.mean == pytest.approx(statistics.fmean(mine))
        assert spread.sd == pytest.approx(statistics.stdev(mine))
        assert f"{spread.mean:.4f} +- {spread.sd:.4f}" in str(result)
    json.dumps(result.to_dict())


def test_search_resumes_where_it_was_stopped(trained: nn.Module, tmp_path: Path) -> None:
    few = QUICK.replace(strategies=("min", "midpoint", "alpha_0.5", "max"))
    whole = run_search(trained, few, folder=tmp_path / "whole")
    calls = 0

    class StopError(RuntimeError):
        pass

    def interrupted(net: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise StopError
        return accuracy(net, VALIDATION)

    with pytest.raises(StopError):
        run_search(trained, few, validate=interrupted, folder=tmp_path / "part")
    assert len(list((tmp_path / "part" / "runs").iterdir())) == 3
    resumed = run_search(trained, few, folder=tmp_path / "part")
    assert without_time(resumed) == without_time(whole)
    assert same_state(resumed.model, whole.model)
    # a third call runs nothing, and gives the same model from the folder
    counted = 0

    def counting(net: nn.Module) -> float:
        nonlocal counted
        counted += 1
        return accuracy(net, VALIDATION)

    again = run_search(trained, few, validate=counting, folder=tmp_path / "part")
    assert counted == 1  # the dense model
    assert same_state(again.model, whole.model)
    assert json.loads((tmp_path / "part" / "result.json").read_text())["chosen"] == whole.chosen.key


def test_folder_of_another_search_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    few = QUICK.replace(scores=("magnitude",), strategies=("min", "max"))
    run_search(trained, few, folder=tmp_path)
    with pytest.raises(ConfigError, match="empty folder"):
        run_search(trained, few.replace(finetune_lr=0.5), folder=tmp_path)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.fc.bias += 1  # type: ignore[union-attr, operator]
    with pytest.raises(ConfigError, match="another model"):
        run_search(other, few, folder=tmp_path)
    # another tolerance is another choice among the same runs
    sparse = run_search(trained, few.replace(max_drop=1.0), folder=tmp_path)
    assert sparse.chosen.strategy == "max"
    assert accuracy(sparse.model, VALIDATION) == sparse.chosen.validation


def test_threads_give_the_sequential_result(trained: nn.Module) -> None:
    config = QUICK.replace(scores=("magnitude",), strategies=("min", "midpoint", "max"))
    one = run_search(trained, config)
    for workers in (2, 0):
        other = run_search(trained, config.replace(workers=workers))
        assert without_time(one) == without_time(other)
        assert same_state(one.model, other.model)


def test_choice() -> None:
    runs = [Run("magnitude", s, sparsity, value, 0.0) for s, sparsity, value in
            (("min", 0.3, 0.9), ("midpoint", 0.6, 0.89), ("max", 0.8, 0.5))]  # fmt: skip
    assert [run.strategy for run in rank(runs[::-1])] == ["min", "midpoint", "max"]
    assert choose(runs, 0.92, None).strategy == "min"
    assert choose(runs, 0.92, 0.05).strategy == "midpoint"
    assert choose(runs, 0.92, 0.5).strategy == "max"
    assert choose(runs, 2.0, 0.01).strategy == "min"  # none within: the best


def test_finetuning_data_must_be_there(trained: nn.Module) -> None:
    options = {"example_inputs": torch.randn(IMAGES), "validate": lambda net: 0.0}
    with pytest.raises(CalibrationError, match="finetune_epochs"):
        search(trained, QUICK, **options)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="calibration_data"):
        search(trained, QUICK.replace(finetune_epochs=0), **options)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no length"):
        search(trained, QUICK, train_data=iter(TRAIN), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("match", ["channels", "parameters"])
@pytest.mark.parametrize("family", [SmallResNet, small_vgg, SmallViT])
def test_ratios_work_in_torch_pruning(family: type[nn.Module], match: str) -> None:
    tp = pytest.importorskip("torch_pruning")
    model = family()
    example = torch.randn(IMAGES)
    ranges, _ = analyse(model, MixAndMatchConfig(), example_inputs=example, calibration_data=TRAIN[:1])
    sparsities = layer_sparsities(ranges, "max")
    before = parameter_count(model)
    ratios = structured_ratios(model, ranges, sparsities, classes=4, match=match)
    assert ratios.pruning_ratio_dict
    widths = {m: getattr(m, "out_channels", getattr(m, "out_features", 0)) for m in ratios.pruning_ratio_dict}
    tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.MagnitudeImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios.pruning_ratio_dict,
        ignored_layers=ratios.ignored_layers,
    ).step()
    assert parameter_count(model) < 0.9 * before
    assert model(example).shape == (4, 4)
    if family is small_vgg:  # no shared channels: each layer has exactly its own ratio
        for module, ratio in ratios.pruning_ratio_dict.items():
            width = getattr(module, "out_channels", getattr(module, "out_features", 0))
            assert width == int(widths[module] * (1 - ratio))


def test_search_with_structured_pruning(trained: nn.Module, tmp_path: Path) -> None:
    tp = pytest.importorskip("torch_pruning")
    example = torch.randn(IMAGES)
    config = QUICK.replace(strategies=("min", "max"))
    ranges, _ = analyse(trained, config, example_inputs=example, calibration_data=TRAIN[:1])

    def prune(net: nn.Module, sparsities: Mapping[str, float]) -> nn.Module:
        ratios = structured_ratios(net, ranges, sparsities, classes=4)
        tp.pruner.BasePruner(
            net, example, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.0,
            pruning_ratio_dict=ratios.pruning_ratio_dict, ignored_layers=ratios.ignored_layers,
        ).step()  # fmt: skip
        return net

    first = run_search(trained, config, prune=prune, folder=tmp_path)
    again = run_search(trained, config, prune=prune, folder=tmp_path)
    assert [run.score for run in first.runs] == ["structured", "structured"]
    assert not first.masks
    removed = 1 - parameter_count(first.model) / parameter_count(trained)
    assert first.chosen.sparsity == pytest.approx(removed)
    assert same_state(first.model, again.model)


def test_technique(trained: nn.Module) -> None:
    config = MixAndMatchConfig.from_dict(
        {
            "algorithm": "mix_and_match",
            "scores": ["magnitude"],
            "strategies": ["min", "max"],
            "finetune_epochs": 1,
        }
    )
    context = Context(
        example_inputs=torch.randn(IMAGES),
        train_data=TRAIN,
        calibration_data=[inputs for inputs, _ in TRAIN],  # hosts give inputs alone
        validate=lambda net: accuracy(net, VALIDATION),
    )
    result = technique.apply(trained, config, context)
    assert len(result.mix_and_match["runs"]) == 2
    with pytest.raises(CalibrationError, match="validate"):
        technique.apply(trained, config, Context(example_inputs=torch.randn(IMAGES), train_data=TRAIN))
    with pytest.raises(CalibrationError, match="example_inputs"):
        technique.apply(trained, config, Context(train_data=TRAIN))
