"""``sigmab compare`` on scikit-learn's digits: rows, twins, resuming, the report, and files that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sigmab_plugin.cli import main
from sigmab_plugin.cli.compare import _splits, read_plan, read_recipe
from sigmab_plugin.cli.comparison import Run, _read_outcome
from sigmab_plugin.data import digits
from sigmab_plugin.tuning.recipe import TrainRecipe, as_recipe

TREE = {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "projection_dim": 8}
HEAD = {"algorithm": "depth_pruning", "epochs": [1], "learning_rates": [0.01], "head_widths": [8]}


def file(folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "model": "cifar_resnet18",
        "model_args": {"num_classes": 10, "in_channels": 1, "width": 0.125},
        "data": "digits",
        "validation_split": "val",
        "epochs": 1,
        "finetune": {"lr": 0.02, "batch_size": 64, "warmup_epochs": 0.0},
        "runs": [
            {"name": "shallow", "compression": {**HEAD, "cut": "layer2"}},
            {"name": "SigmaB", "compression": [TREE]},
            {"name": "SigmaB -> short leaves", "compression": [TREE, HEAD]},
        ],
        **changes,
    }
    path = folder / "many.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def compare(config: Path, out: Path, *words: str) -> int:
    return main(["compare", "--config", str(config), "--out", str(out), "--threads", "1", *words])


@pytest.mark.slow
def test_rows_twins_report_and_resuming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "out"
    assert compare(file(tmp_path), out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in printed["networks"]}
    assert list(rows) == ["dense", "shallow", "SigmaB", "static twin of SigmaB", "SigmaB -> short leaves"]
    assert [row["role"] for row in rows.values()] == ["dense", "other", "sigmab", "twin", "sigmab"]
    assert rows["shallow"]["stored_bytes"] < rows["dense"]["stored_bytes"]
    assert rows["SigmaB"]["active_bytes"] < rows["SigmaB"]["stored_bytes"]
    assert rows["SigmaB -> short leaves"]["active_parameters"] < rows["SigmaB"]["active_parameters"]
    page = (out / "report.html").read_text()
    assert page.count("<circle") == 10
    assert "Accuracy against bytes" in page
    assert "static twin of SigmaB" in page

    stamps = {path: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert len(stamps) == 5
    shares = [json.loads(path.read_text())["leaf_shares"] for path in stamps]
    assert sorted(len(share) for share in shares) == [0, 0, 0, 4, 4]
    assert all(sum(share) == pytest.approx(1) for share in shares if share)
    resumed = [_read_outcome(path, Run("resumed")) for path in stamps]
    assert [list(outcome.leaf_shares) for outcome in resumed if outcome] == shares
    starved = any(min(share) < 0.01 for share in shares if share)
    assert ("hardly used" in page) == starved
    assert compare(file(tmp_path), out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["networks"] == printed["networks"]
    assert {path: path.stat().st_mtime_ns for path in (out / "rows").iterdir()} == stamps

    # A row whose sections change is run again, the others are not.
    changed = [{"name": "shallow", "compression": {**HEAD, "cut": "layer1"}}]
    assert compare(file(tmp_path, runs=changed), out, "--json") == 0
    again = {row["name"]: row for row in json.loads(capsys.readouterr().out)["networks"]}
    assert again["shallow"]["stored_parameters"] < rows["shallow"]["stored_parameters"]
    assert again["dense"] == rows["dense"]

    broken = next(iter(stamps))
    broken.write_text("{")
    assert compare(file(tmp_path), out) == 2
    assert "remove it to run it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "'runs' must be a list"),
        ({"data": None}, "'data' is missing"),
        ({"epoch": 3}, "did you mean 'epochs'?"),
        ({"finetune": {"learning_rate": 1}}, "unknown key 'learning_rate'"),
        ({"epochs": "2"}, "'epochs' must be a whole number, 0 for none; got \"2\""),
        ({"epochs": -1}, "'epochs' must be a whole number, 0 for none; got -1"),
        ({"epochs": True}, "'epochs' must be a whole number, 0 for none; got true"),
        ({"finetune": "cifar100"}, "'finetune' must be an object of the recipe's fields, such as"),
        (
            {"data": ["a.npz", "b.npz"]},
            'several files are one text with commas between; got ["a.npz", "b.npz"]',
        ),
        ({"model": {"name": "cifar_resnet18"}}, "'model' must be a text such as"),
        ({"model_args": [10]}, "'model_args' must be an object of keyword arguments"),
        ({"weights": 3}, "'weights' must be the path of a file, or null"),
        ({"image_size": "8"}, "'image_size' must be a whole number above 0, or null"),
        ({"batch_size": 0}, "'batch_size' must be a whole number above 0; got 0"),
        ({"calibration_samples": 0}, "'calibration_samples' must be a whole number above 0"),
        ({"validation_fraction": 1}, "'validation_fraction' must be a number between 0 and 1"),
        ({"twins": "no"}, "'twins' must be true or false"),
        ({"runs": {"name": "a"}}, "'runs' must be a list of objects"),
        (
            {"runs": [{"name": "a", "compression": ["sigmab"]}]},
            "runs[0]: 'compression' must be a section or a list",
        ),
        ({"runs": [{"name": "a", "compression": [None]}]}, 'such as {"algorithm": "legonet"}; got [null]'),
        (
            {"runs": [{"name": "a", "compression": "sigmab"}]},
            "runs[0]: 'compression' must be a section or a list",
        ),
        ({"test_split": "val"}, "must be three splits; got train, val, val"),
        ({"runs": [{"name": None, "compression": []}]}, "runs[0]: 'name' must be a text; got null"),
        ({"runs": [{"name": "dense", "compression": []}]}, "the row 'dense' is the network as given"),
        ({"runs": [{"name": "a"}]}, "runs[0] must be an object with 'name' and 'compression'"),
        ({"runs": [{"name": "a", "compression": []}] * 2}, "two runs have the same name"),
        ({"runs": [{"name": "a", "compression": {"algorithm": "lego"}}]}, "unknown algorithm 'lego'"),
        (
            {"runs": [{"name": "a", "compression": [{"algorithm": "legonet"}, TREE]}]},
            "Sensible order: sigmab -> legonet",
        ),
    ],
)
def test_a_file_that_makes_no_sense_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert compare(file(tmp_path, **changes), tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sigmab: error: ")
    assert message in error
    assert not (tmp_path / "out" / "rows").exists()


def test_each_of_several_data_files_is_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir("/")
    plan = read_plan(file(tmp_path, data="a.npz, b.npz"))
    assert plan.path("data") == f"{tmp_path / 'a.npz'},{tmp_path / 'b.npz'}"
    assert read_plan(file(tmp_path, data="elsewhere.npz")).path("data") == "elsewhere.npz"


def flat(folder: Path) -> Path:
    """200 digits, told apart by their first value, without splits."""
    images, labels = digits("train").batch(range(200))
    images[:, 0, 0, 0] = images.new_tensor(range(200)) / 200
    np.savez(folder / "flat.npz", x=images.numpy(), y=labels.numpy())
    return file(
        folder,
        data="flat.npz",
        validation_split=None,
        epochs=0,
        twins=False,
        runs=[{"name": "again", "compression": []}],
    )


def test_data_without_splits_give_a_test_part_of_their_own(tmp_path: Path) -> None:
    def samples(seed: int) -> list[set[float]]:
        parts = _splits(read_plan(flat(tmp_path)), seed=seed)
        assert parts.test_held_out
        return [
            set(part.batch(range(len(part)))[0][:, 0, 0, 0].tolist())
            for part in (parts.train, parts.validation, parts.test)
        ]

    first = samples(0)
    assert len(set.union(*first)) == sum(map(len, first)) == 200
    assert len(first[2]) == pytest.approx(40, abs=5)
    assert samples(0) == first
    assert samples(1)[2] != first[2]


def test_the_report_says_what_the_test_part_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compare(flat(tmp_path), out, "--seed", "3", "-q") == 0, capsys.readouterr().err
    report = json.loads((out / "report.json").read_text())
    test = len(_splits(read_plan(flat(tmp_path)), seed=3).test)
    assert report["facts"]["Data"].endswith(f" {test} test")
    assert report["notes"][1] == (
        "The data have no splits: the test samples are 20% of every class, held out with seed 3 before anything else "
        "was taken from the data."
    )
    assert compare(file(tmp_path, runs=[{"name": "again", "compression": []}], epochs=0), out, "-q") == 0
    assert "have no splits" not in (out / "report.json").read_text()


def test_a_split_that_is_named_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = flat(tmp_path)
    config.write_text(json.dumps({**json.loads(config.read_text()), "test_split": "test"}))
    assert compare(config, tmp_path / "out") == 2
    assert "flat.npz" in capsys.readouterr().err


def test_recipe_of_the_file() -> None:
    default = as_recipe("default")
    assert read_recipe({}, 5, batch_size=256) == default.replace(warmup_epochs=0.5)
    assert read_recipe({}, 0, batch_size=256).warmup_epochs == 0
    assert read_recipe({}, 100, batch_size=256) == default
    assert read_recipe({}, 100, batch_size=64) == default.replace(lr=0.025, batch_size=64)
    # As in a recipe's own file, what the file leaves out is the paper's; but the warm-up has to fit.
    assert read_recipe({"lr": 0.02}, 5, batch_size=64) == TrainRecipe(lr=0.02, warmup_epochs=0.5)
    assert read_recipe({"warmup_epochs": 1.0}, 2, batch_size=64).warmup_epochs == 1


def test_a_last_batch_of_one_sample_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BatchNorm has no variance over one value of a channel."""
    config = file(
        tmp_path,
        batch_size=92,
        twins=False,
        runs=[{"name": "SigmaB", "compression": TREE}],
        model_args={"num_classes": 10, "in_channels": 1, "width": 0.0625},
    )
    parts = _splits(read_plan(config), seed=0)
    assert len(parts.train) % 92 == 1
    assert compare(config, tmp_path / "out", "-q") == 0, capsys.readouterr().err
