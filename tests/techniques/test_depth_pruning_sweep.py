"""Training of the auxiliary head, sweep of all cuts, choice, int8 export, and the technique's entry."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.errors import CalibrationError, ConfigError, FormatError
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.depth_pruning import (
    DepthPrunedNet,
    DepthPruningConfig,
    SweepResult,
    SweepRow,
    apply,
    depth_prune,
    export_int8,
    from_sweep,
    pareto,
    sweep,
    technique,
    train,
)

FRAMES = (16, 6)
QUICK = DepthPruningConfig(epochs=(6, 2), learning_rates=(1e-2, 2e-3), latency_repeats=2, head_widths=(12,))


def clips(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes that a mean over the map cannot tell: bars along time, along frequency, and noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (count,), generator=generator)
    values = torch.randn(count, 1, *FRAMES, generator=generator) * 0.3
    rows = torch.tensor([1.0, -1.0]).repeat(FRAMES[0] // 2).reshape(1, 1, -1, 1)
    columns = torch.tensor([1.0, -1.0]).repeat(FRAMES[1] // 2).reshape(1, 1, 1, -1)
    values = (
        values + (targets == 0).reshape(-1, 1, 1, 1) * rows + (targets == 1).reshape(-1, 1, 1, 1) * columns
    )
    return values, targets


def batches(seed: int = 1, count: int = 192) -> list[tuple[torch.Tensor, torch.Tensor]]:
    values, targets = clips(count, seed)
    return list(zip(values.split(32), targets.split(32), strict=True))


def accuracy(net: nn.Module) -> float:
    values, targets = clips(120, 2)
    net.eval()
    with torch.no_grad():
        return float((net(values).argmax(1) == targets).float().mean())


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """A small DS-CNN, trained for real on the synthetic clips."""
    torch.manual_seed(0)
    model = DSCNN(3, width=12, blocks=2, input_size=FRAMES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        for values, targets in batches():
            loss = nn.functional.cross_entropy(model(values), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert accuracy(model) > 0.9
    return model.eval()


def example() -> torch.Tensor:
    return clips(2, 0)[0]


# Training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"freeze": False}, {"cache_features": True}])
def test_training_learns_the_task(dense: nn.Module, options: dict[str, bool]) -> None:
    config = QUICK.replace(cut="block1", **options)
    net = depth_prune(dense, example(), cut="block1", head_widths=(12,), freeze=config.freeze)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    losses = train(net, batches(), config)
    assert len(losses) == 8
    assert losses[-1] < losses[0] / 2
    assert accuracy(net) > 0.9
    assert not net.training
    kept = {
        name: tensor for name, tensor in net.state_dict().items() if not name.startswith("auxiliary_head.")
    }
    changed = {name for name, tensor in kept.items() if not torch.equal(tensor, before[name])}
    assert bool(changed) is not config.freeze


@pytest.mark.parametrize("cut", ["block1", ""])
def test_what_follows_in_a_list_trains_the_kept_layers_too(dense: nn.Module, cut: str) -> None:
    """``freeze`` is for the training of the head; a tree made of the result must not inherit it."""
    config = QUICK.replace(cut=cut, freeze=True, max_drop=0.5)
    context = Context(example_inputs=example(), train_data=batches(), validate=accuracy)
    net = apply(dense, config, context)
    assert all(parameter.requires_grad for parameter in net.parameters())
    net.train()
    assert all(module.training for module in net.modules())


def test_same_seed_same_weights(dense: nn.Module) -> None:
    config = QUICK.replace(cut="block1", cache_features=True)
    nets = []
    for _ in range(2):
        net = depth_prune(dense, example(), cut="block1", seed=config.seed)
        train(net, batches(), config)
        nets.append(net.state_dict())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_training_refuses_no_data_and_nan(dense: nn.Module) -> None:
    net = depth_prune(dense, example(), cut="block1")
    with pytest.raises(CalibrationError, match="no batch"):
        train(net, [], QUICK)
    with pytest.raises(CalibrationError, match="no batch"):
        train(net, [], QUICK.replace(cache_features=True))
    with pytest.raises(CalibrationError, match="NaN"):
        train(net, [(torch.full((4, 1, *FRAMES), float("nan")), torch.zeros(4, dtype=torch.long))], QUICK)


# Sweep ---------------------------------------------------------------------------------------------


def test_sweep_measures_every_cut(dense: nn.Module, tmp_path: Path) -> None:
    result = sweep(
        dense, example(), train_data=batches(), validate=accuracy, config=QUICK, directory=tmp_path / "sweep"
    )
    assert [row.cut for row in result.rows] == ["", "stem", "block1", "block2"]
    assert result.dense.parameters == sum(p.numel() for p in dense.parameters())
    assert [row.macs for row in result.rows[1:]] == sorted(row.macs for row in result.rows[1:])
    assert all(row.latency_ms > 0 for row in result.rows)
    assert all(row.score > 0.6 for row in result.rows)
    chosen = result.smallest(max_drop=1.0)
    assert chosen.parameters == min(row.parameters for row in result.rows)
    assert result.smallest(max_drop=0.0).score >= result.dense.score
    net = from_sweep(tmp_path / "sweep", "block1", dense, example())
    assert accuracy(net) == next(row.score for row in result.rows if row.cut == "block1")
    assert json.loads(json.dumps(result.to_dict()))["rows"][0]["cut"] == ""


def test_sweep_goes_on_where_it_stopped(dense: nn.Module, tmp_path: Path) -> None:
    calls: list[int] = []

    def interrupted(net: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accuracy(net)

    arguments = {"train_data": batches(), "config": QUICK, "directory": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        sweep(dense, example(), validate=interrupted, **arguments)
    finished = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["cut"] for row in finished] == ["", "stem"]
    result = sweep(dense, example(), validate=interrupted, **arguments)
    assert len(calls) == 5
    assert [row.cut for row in result.rows] == ["", "stem", "block1", "block2"]
    assert sweep(dense, example(), validate=interrupted, **arguments) == result
    assert len(calls) == 5


def test_a_resumed_sweep_equals_an_uninterrupted_one(dense: nn.Module, tmp_path: Path) -> None:
    first = sweep(dense, example(), train_data=batches(), validate=accuracy, config=QUICK, cuts=["block1"])
    sweep(
        dense,
        example(),
        train_data=batches(),
        validate=accuracy,
        config=QUICK,
        cuts=["stem"],
        directory=tmp_path,
    )
    both = sweep(
        dense,
        example(),
        train_data=batches(),
        validate=accuracy,
        config=QUICK,
        cuts=["stem", "block1"],
        directory=tmp_path,
    )
    assert both.rows[2].score == first.rows[1].score


def test_a_resumed_sweep_equals_an_uninterrupted_one_whatever_shuffles_the_loader(
    dense: nn.Module, tmp_path: Path
) -> None:
    values, targets = clips(96, 1)
    config = QUICK.replace(epochs=(2,), learning_rates=(1e-2,))
    loader = DataLoader(TensorDataset(values, targets), 32, shuffle=True)

    def run(name: str, *cuts: str) -> None:
        sweep(
            dense,
            example(),
            train_data=loader,
            validate=accuracy,
            config=config,
            cuts=cuts,
            directory=tmp_path / name,
        )

    run("whole", "stem", "block1")
    run("parts", "stem")
    run("parts", "stem", "block1")
    first, second = (load_file(tmp_path / name / "block1.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_score_that_is_nan(dense: nn.Module, tmp_path: Path) -> None:
    arguments = {"train_data": batches(count=32), "cuts": ["stem", "block1"], "directory": tmp_path}
    config = QUICK.replace(epochs=(1,), learning_rates=(1e-2,))
    with pytest.raises(CalibrationError, match="validate gave NaN for the network as it was given"):
        sweep(dense, example(), validate=lambda _net: math.nan, config=config, **arguments)
    assert not list(tmp_path.iterdir())
    scores = iter((0.5, math.nan, 0.5))
    result = sweep(dense, example(), validate=lambda _net: next(scores), config=config, **arguments)
    assert math.isnan(result.rows[1].score)
    assert "stem" not in [item.cut for item in result.pareto()]
    assert min(result.rows, key=lambda item: item.parameters).cut == "stem"
    assert result.smallest(max_drop=1.0).cut != "stem"


def test_results_of_another_model_or_format_are_refused(dense: nn.Module, tmp_path: Path) -> None:
    arguments = {"train_data": batches(), "validate": accuracy, "directory": tmp_path, "cuts": ["stem"]}
    sweep(dense, example(), config=QUICK, **arguments)
    with pytest.raises(FormatError, match="another model or other options"):
        sweep(dense, example(), config=QUICK.replace(seed=1), **arguments)
    torch.manual_seed(5)
    with pytest.raises(FormatError, match="another model"):
        sweep(DSCNN(3, width=12, blocks=2, input_size=FRAMES), example(), config=QUICK, **arguments)
    content = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**content, "version": 9}))
    with pytest.raises(FormatError, match="version 9"):
        sweep(dense, example(), config=QUICK, **arguments)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(FormatError, match="not a sweep"):
        sweep(dense, example(), config=QUICK, **arguments)


def row(cut: str, parameters: int, macs: int, latency: float, score: float) -> SweepRow:
    return SweepRow(cut, parameters, 0, macs, 4 * parameters, latency, score, 0.0)


def test_a_row_that_loses_exactly_max_drop_is_good_enough() -> None:
    result = SweepResult((row("", 9, 9, 9.0, 0.52), row("a", 5, 5, 5.0, 0.47), row("b", 4, 4, 4.0, 0.46)))
    assert 0.47 < 0.52 - 0.05
    assert result.smallest(max_drop=0.05).cut == "a"


def test_pareto_set_by_hand() -> None:
    rows = [
        row("", 9, 9, 9.0, 0.9),
        row("a", 5, 5, 9.5, 0.8),
        row("b", 6, 6, 9.6, 0.7),
        row("c", 5, 5, 9.5, 0.8),
    ]
    assert [item.cut for item in pareto(rows)] == ["", "a"]


def test_pareto_rows_are_not_dominated_and_dominate_the_rest() -> None:
    generator = random.Random(0)
    for _ in range(50):
        rows = [
            row(str(i), generator.randint(1, 4), generator.randint(1, 4), 1.0, generator.randint(1, 4))
            for i in range(8)
        ]

        def beats(one: SweepRow, other: SweepRow) -> bool:
            return one.parameters <= other.parameters and one.macs <= other.macs and one.score >= other.score

        front = pareto(rows)
        for item in rows:
            assert any(beats(good, item) for good in front)
        for item in front:
            assert not any(beats(good, item) for good in front if good is not item)


# Technique -----------------------------------------------------------------------------------------


def test_apply_with_a_cut(dense: nn.Module) -> None:
    context = Context(example_inputs=example(), train_data=batches())
    net = technique.apply(dense, QUICK.replace(cut="block1"), context)
    assert isinstance(net, DepthPrunedNet)
    assert accuracy(net) > 0.9


def test_apply_chooses_the_smallest_good_cut(dense: nn.Module, tmp_path: Path) -> None:
    context = Context(
        example_inputs=example(),
        train_data=batches(),
        validate=accuracy,
        options={"folder": tmp_path},
    )
    net = technique.apply(dense, QUICK.replace(max_drop=1.0), context)
    assert isinstance(net, DepthPrunedNet)
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert net.cut == min(rows, key=lambda item: item["parameters"])["cut"]


def test_apply_says_what_is_missing(dense: nn.Module) -> None:
    with pytest.raises(ConfigError, match="example_inputs"):
        technique.apply(dense, QUICK, Context())
    with pytest.raises(CalibrationError, match="train_data and validate"):
        technique.apply(dense, QUICK, Context(example_inputs=example()))


def test_section_round_trip_and_bad_values() -> None:
    section = QUICK.replace(cut="block1").to_dict()
    assert section["algorithm"] == technique.name == "depth_pruning"
    assert DepthPruningConfig.from_dict(json.loads(json.dumps(section))) == QUICK.replace(cut="block1")
    for bad, message in (
        ({"epochs": [1]}, "one of each per stage"),
        ({"head_widths": [0]}, "head_widths"),
        ({"epochs": [1, 1, -1]}, "negative"),
        ({"freeze": False, "cache_features": True}, "stale"),
        ({"granularity": "channel"}, "granularity"),
        ({"cutt": "block1"}, "Did you mean 'cut'"),
    ):
        with pytest.raises(ConfigError, match=message):
            DepthPruningConfig.from_dict({"algorithm": "depth_pruning", **bad})


# Export --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_int8_export_runs_and_is_smaller(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    values = torch.randn(32, 1, 49, 10)
    net = depth_prune(DSCNN(), values, cut="block2").train()
    net(values)  # running statistics of the head
    net.eval()
    written = export_int8(net, tmp_path / "net.onnx", calibration_data=values.split(16))
    assert written.file_bytes == (tmp_path / "net.onnx").stat().st_size < 0.65 * written.float_file_bytes
    weights = [m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert written.int8_values >= sum(weights)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_0": values[:7].numpy()})
    with torch.no_grad():
        expected = net(values[:7])
    assert logits.shape == (7, 12)
    assert (torch.from_numpy(logits) - expected).norm() < 0.2 * expected.norm()
    assert 0.0 <= written.agreement <= 1.0
    with pytest.raises(CalibrationError, match="no batch"):
        export_int8(net, tmp_path / "none.onnx", calibration_data=[])
