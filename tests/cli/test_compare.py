"""``sigmab compare`` on scikit-learn's digits: rows, twins, resuming, the report, and files that make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sigmab_plugin.cli import main
from sigmab_plugin.cli.comparison import Run, _read_outcome

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
