"""``sigmab compare`` called again: what is changed runs anew, what is not is kept, and stopping changes nothing."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sigmab_plugin.cli import main
from sigmab_plugin.cli.comparison import Comparison, Outcome, Run, digest
from sigmab_plugin.data import ArrayDataset, Loader
from sigmab_plugin.hosts.nncf_schema import techniques
from sigmab_plugin.models import DSCNN
from sigmab_plugin.tuning import TrainRecipe

TREE = {"algorithm": "sigmab", "levels": ["block2", "block3"], "head": "pool", "projection_dim": 4}
MASKS = {
    "algorithm": "mix_and_match",
    "scores": ["gradient"],
    "strategies": ["min", "alpha_0.7"],
    "small_layer_parameters": 50,
    "finetune_epochs": 2,
}
CODEBOOK = {"algorithm": "legonet", "codebook_size": 8, "scale": "row", "finetune_epochs": 2}
SIZES = {"train": 96, "val": 32, "test": 32}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Three patterns in noise, by split."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).normal(size=(3, 1, 8, 8))
    made = {}
    for name, size in SIZES.items():
        labels = np.arange(size) % 3
        noise = generator.normal(size=(size, 1, 8, 8))
        made[f"{name}_x"], made[f"{name}_y"] = (patterns[labels] + noise).astype(np.float32), labels
    return made


def config(folder: Path, **changes: Any) -> Path:
    content = {
        "model": "DSCNN",
        "model_args": {"num_classes": 3, "width": 8, "blocks": 3, "input_size": [8, 8]},
        "data": "data.npz",
        "validation_split": "val",
        "batch_size": 32,
        "calibration_samples": 64,
        "epochs": 1,
        "twins": False,
        "finetune": {"optimizer": "adam", "lr": 0.01, "warmup_epochs": 0.0},
        "runs": [{"name": "SigmaB", "compression": [TREE]}],
        **changes,
    }
    path = folder / "many.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
def test_changed_data_and_settings_run_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def compare(**changes: Any) -> set[str]:
        """The rows that were not there before."""
        before = {path.name for path in (out / "rows").glob("*")}
        words = ["--config", str(config(tmp_path, **changes)), "--out", str(out), "--threads", "1", "-q"]
        assert main(["compare", *words]) == 0, capsys.readouterr().err
        return {path.name for path in (out / "rows").glob("*")} - before

    np.savez(tmp_path / "data.npz", **arrays())  # type: ignore[arg-type]
    assert len(compare()) == 2
    assert not compare()

    # Another file of the same name and sizes, and a file with one label of one split changed.
    np.savez(tmp_path / "data.npz", **arrays(seed=1))  # type: ignore[arg-type]
    assert len(compare()) == 2
    for split in SIZES:
        changed = arrays()
        changed[f"{split}_y"][5] = 0
        np.savez(tmp_path / "data.npz", **changed)  # type: ignore[arg-type]
        assert len(compare()) == 2
    np.savez(tmp_path / "copy.npz", **arrays())  # type: ignore[arg-type]
    assert not compare(data="copy.npz")  # what counts is the content

    for changes in (
        {"calibration_samples": 32},
        {"batch_size": 16},
        {"epochs": 2},
        {"finetune": {"optimizer": "adam", "lr": 0.02, "warmup_epochs": 0.0}},
        {"test_split": "val", "validation_split": "test"},
    ):
        assert len(compare(data="copy.npz", **changes)) == 2, changes
    assert not compare(data="copy.npz")


def comparison(directory: Path) -> Comparison:
    splits = arrays()

    def loader(name: str, *, shuffle: bool = False) -> Loader:
        values = ArrayDataset(splits[f"{name}_x"], splits[f"{name}_y"], list("abc"), "image")
        return Loader(values, batch_size=16, shuffle=shuffle)

    torch.manual_seed(0)
    train = loader("train", shuffle=True)
    return Comparison(
        model=DSCNN(3, width=8, blocks=3, input_size=(8, 8)).eval(),
        example=torch.from_numpy(splits["train_x"][:1]),
        train=train,
        validation=loader("val"),
        test=loader("test"),
        calibration=[inputs for inputs, _ in loader("train")],
        techniques=techniques(),
        recipe=TrainRecipe(optimizer="adam", lr=0.01, warmup_epochs=0.0),
        epochs=3,
        directory=directory,
    )


def test_stopping_between_rows_changes_no_row(tmp_path: Path) -> None:
    """Training leaves the loader in another epoch than a fresh process finds it in."""
    tree, masks, codebook = Run("tree", (TREE,)), Run("masks", (MASKS,)), Run("codebook", (CODEBOOK,))

    def plain(outcomes: list[Outcome]) -> list[dict[str, Any]]:
        return [{**asdict(outcome), "seconds": 0} for outcome in outcomes]

    whole = plain(comparison(tmp_path / "whole").run([tree, masks, codebook]))
    for runs in ([tree], [tree, masks], [tree, masks, codebook]):
        torch.manual_seed(len(runs))
        part = plain(comparison(tmp_path / "part").run(runs))
    assert part == whole
    results = [
        json.loads(path.read_text())
        for name in ("whole", "part")
        for path in (tmp_path / name / "checkpoints").glob("*/result.json")
    ]
    assert len(results) == 2
    for result in results:
        for row in result["runs"]:
            row["seconds"] = 0
    assert results[0] == results[1]


def test_every_row_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trees with the same techniques after them, and a run that is called as a twin would be."""
    runs = [
        Run("static twin of tree", (MASKS,)),
        Run("tree", (TREE,)),
        Run("small", (TREE, CODEBOOK)),
        Run("a", ({**TREE, "projection_dim": 2}, CODEBOOK)),
        Run("b", ({**TREE, "projection_dim": 3}, CODEBOOK)),
    ]
    monkeypatch.setattr(
        Comparison, "_outcome", lambda self, run, role: SimpleNamespace(row=SimpleNamespace(name=run.name))
    )
    names = [outcome.row.name for outcome in comparison(tmp_path).run(runs)]
    assert names == [
        "dense",
        "static twin of tree",
        "tree",
        "static twin of tree (tree)",
        "small",
        "a",
        "static twin of sigmab",
        "b",
        "static twin of sigmab (b)",
    ]


def test_digest_tells_content_shape_type_and_order_apart() -> None:
    values = torch.arange(6, dtype=torch.float32)
    different = [
        [values],
        [values.view(2, 3)],
        [values.int()],
        [values[:3], values[3:]],
        [(values[:3], values[3:])],
        [values.flip(0)],
        [("name", values)],
        [],
    ]
    assert len({digest(value) for value in different}) == len(different)
    assert digest([values.clone()]) == digest(iter([values]))
