"""The way of a user: weights on disk, compress, inspect, finetune, evaluate; and the demo."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sigmab_plugin
from sigmab_plugin.cli import build_parser, main
from sigmab_plugin.cli.compress import read_config
from sigmab_plugin.cli.compress_file import merged
from sigmab_plugin.cli.measure import example_of
from sigmab_plugin.data import ArrayDataset, digits
from sigmab_plugin.errors import ConfigError
from sigmab_plugin.models import cifar_resnet18

MODEL_ARGS = {"num_classes": 10, "width": 0.0625, "in_channels": 1}
MODEL = ["--model", "cifar_resnet18", "--model-args", json.dumps(MODEL_ARGS)]
TREE = ["--levels", "layer3", "layer4", "--head", "fc", "--projection-dim", "8"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code = main([*words, "--json", "--threads", "1"] if words[0] != "inspect" else [*words, "--json"])
    streams = capsys.readouterr()
    assert code == 0, streams.err
    result: dict[str, Any] = json.loads(streams.out)
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_file(cifar_resnet18(**MODEL_ARGS).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """What compress writes; tests read it only."""
    out = tmp_path_factory.mktemp("run") / "tree"
    words = ["--weights", str(dense), "--data", "digits", "--out", str(out), "--twin", "--quiet"]
    assert main(["compress", *MODEL, *TREE, *words]) == 0
    return out


def test_compress_writes_a_net_that_the_library_loads(tree: Path) -> None:
    net = sigmab_plugin.load(tree, cifar_resnet18(**MODEL_ARGS))
    assert net.leaves == ("0/0", "0/1", "1/0", "1/1")
    assert net.config.projection_dim == 8
    assert {path.name for path in tree.iterdir()} == {
        "plan.json", "model.safetensors", "sigmab.json", "twin.safetensors",
    }  # fmt: skip


def test_inspect_counts_what_the_net_counts(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = sigmab_plugin.load(tree, cifar_resnet18(**MODEL_ARGS)).parameter_counts()
    record = run(capsys, "inspect", str(tree))
    assert sum(node["values"] for node in record["nodes"]) == counts.total
    assert {leaf: size["values"] for leaf, size in record["paths"].items()} == counts.per_path
    assert main(["inspect", str(tree)]) == 0
    text = capsys.readouterr().out
    for part in (
        "backbone",
        "specializer 0/1",
        "router 1",
        "head 1/1",
        f"{counts.total:,}",
        "projection_dim 8",
    ):
        assert part in text


class Scaled(nn.Module):
    """A layer with a buffer that is no statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x)) * self.scale[0]


def test_inspect_calls_no_buffer_a_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(32, 8)
    names = OrderedDict(stem=Scaled(), l1=nn.Sequential(nn.Linear(8, 8), nn.ReLU()), head=nn.Linear(8, 3))
    options: dict[str, Any] = {"levels": ["l1"], "head": "head", "projection_dim": 4}
    net = sigmab_plugin.SigmaBPruner(nn.Sequential(names), x[:1], calibration_data=[x], **options).step()
    sigmab_plugin.save(net, tmp_path)
    (backbone, *_) = run(capsys, "inspect", str(tmp_path))["nodes"]
    assert backbone["values"] == net.parameter_counts().backbone + 1000
    assert "parameters" not in backbone
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "values: parameters, and buffers other than BatchNorm's statistics" in text
    assert "parameters  " not in text


def test_compress_from_a_config_file_equals_the_options(
    tree: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "projection_dim": 8}
    config = tmp_path / "nncf.json"
    config.write_text(json.dumps({"input_info": {"sample_size": [1, 1, 8, 8]}, "compression": [section]}))
    again = tmp_path / "again"
    words = ["--weights", str(dense), "--data", "digits", "--out", str(again)]
    run(capsys, "compress", *MODEL, "--config", str(config), *words)
    assert (again / "model.safetensors").read_bytes() == (tree / "model.safetensors").read_bytes()


def test_compress_repairs(
    tree: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", str(dense), "--data", "digits", "--out", str(tmp_path / "repaired")]
    run(capsys, "compress", *MODEL, *TREE, *words, "--repair", "least_squares")
    copied, repaired = (
        sigmab_plugin.load(folder, cifar_resnet18(**MODEL_ARGS)) for folder in (tree, tmp_path / "repaired")
    )
    assert repaired.config.repair == "least_squares"
    assert repaired.parameter_counts() == copied.parameter_counts()
    assert not torch.equal(repaired.heads["0_0"].fc.weight, copied.heads["0_0"].fc.weight)


def test_finetune_then_evaluate(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tmp_path / "tuned"
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"lr": 0.05, "warmup_epochs": 0.0, "label_smoothing": 0.0}')
    words = ["finetune", str(tree), "--data", "digits", "--recipe", str(recipe), "--out", str(tuned)]
    words += ["--epochs", "2", "--keep", "best"]
    run(capsys, *words)
    log = json.loads((tuned / "log.json").read_text())
    assert [record["epoch"] for record in log["records"]] == [1, 2]
    assert log["records"][1]["train_loss"] < log["records"][0]["train_loss"]
    best = load_file(tuned / "checkpoints" / "sigmab" / "best.safetensors")
    saved = load_file(tuned / "model.safetensors")
    assert saved.keys() == best.keys()
    assert all(torch.equal(saved[name], best[name]) for name in saved)

    page = tmp_path / "report.html"
    result = run(capsys, "evaluate", str(tuned), "--data", "digits", "--report", str(page))
    roles = [row["role"] for row in result["networks"]]
    assert roles == ["dense", "sigmab", "twin"]
    assert all(0 <= row["accuracy"] <= 1 for row in result["networks"])
    assert sum(result["leaf_shares"].values()) == pytest.approx(1)
    text = page.read_text(encoding="utf-8")
    assert "Leaf shares in training" in text
    assert str(page) == result["files"]["report"]
    # A second evaluation of what was saved gives the same numbers.
    again = run(capsys, "evaluate", str(tuned), "--data", "digits")
    assert again["networks"] == result["networks"]


def test_best_epoch_needs_validation(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", str(tree), "--data", "digits", "--keep", "best", "--val-fraction", "0"]
    assert main([*words, "--out", str(tmp_path / "tuned")]) == 2
    assert "--keep best needs validation" in capsys.readouterr().err


def test_evaluate_without_dense_weights_leaves_out_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tree"
    run(capsys, "compress", *MODEL, *TREE, "--data", "digits", "--samples", "200", "--out", str(out))
    result = run(capsys, "evaluate", str(out), "--data", "digits")
    assert [row["role"] for row in result["networks"]] == ["sigmab"]
    assert main(["finetune", str(out), "--data", "digits", "--distill", "1", "--out", str(out)]) == 2
    assert "needs the dense network's weights" in capsys.readouterr().err


def test_a_report_does_not_replace_files_of_the_network(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tree / "plan.json").read_bytes()
    for name in ("plan.html", "plan.json"):
        assert main(["evaluate", str(tree), "--data", "digits", "--report", str(tree / name)]) == 2
        assert "samples" not in capsys.readouterr().err  # it is said before the work
    assert (tree / "plan.json").read_bytes() == before


def test_evaluate_names_no_split_that_the_data_lack(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = digits("test").batch(range(360))
    x, y = images.numpy(), labels.numpy()
    np.savez(tmp_path / "flat.npz", x=x, y=y)
    np.savez(tmp_path / "parts.npz", test_x=x, test_y=y, train_x=x[:90], train_y=y[:90])
    facts = {}
    words: list[str]
    for name, words in (("flat", []), ("parts", []), ("named", ["--split", "train"])):
        data = tmp_path / f"{'parts' if name == 'named' else name}.npz"
        page = tmp_path / f"{name}.html"
        run(capsys, "evaluate", str(tree), "--data", str(data), *words, "--report", str(page))
        facts[name] = json.loads(page.with_suffix(".json").read_text())["facts"]["Data"]
    assert facts == {
        "flat": "flat.npz, all of it, which has no splits: 360 samples",
        "parts": "parts.npz, test: 360 samples",
        "named": "parts.npz, train: 90 samples",
    }
    words = ["evaluate", str(tree), "--data", str(tmp_path / "flat.npz"), "--split", "test"]
    assert main(words) == 2
    assert "test" in capsys.readouterr().err


def test_an_empty_data_set_is_one_line(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 1, 8, 8), np.float32), y=np.zeros(0, int))
    for words in (["evaluate"], ["finetune", "--out", str(tmp_path / "tuned")]):
        assert main([*words, str(tree), "--data", str(tmp_path / "none.npz")]) == 2
        assert "no samples" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no samples"):
        example_of(ArrayDataset(np.zeros((0, 3)), [], ["a"], "features"), "cpu")


def test_compress_without_weights_says_so(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [
        "compress",
        *MODEL,
        *TREE,
        "--data",
        "digits",
        "--samples",
        "64",
        "--out",
        str(tmp_path / "tree"),
    ]
    with caplog.at_level(logging.WARNING):
        run(capsys, *words, "--weights", str(dense))
        assert "--weights" not in caplog.text
        run(capsys, *words)
    assert [record.getMessage() for record in caplog.records if "--weights" in record.getMessage()] == [
        "no --weights: what is compressed are the weights that cifar_resnet18 returns, random unless it loads "
        "some itself"
    ]


@pytest.mark.parametrize(
    ("options", "seed"), [([], 7), (["--seed", "0"], 0), (["--seed", "3"], 3)], ids=["none", "zero", "three"]
)
def test_seed_of_a_config_file(options: list[str], seed: int, tmp_path: Path) -> None:
    """An explicit 0 is a seed like any other."""
    tree = {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "seed": 7}
    (tmp_path / "one.json").write_text(json.dumps(tree))
    (tmp_path / "two.json").write_text(json.dumps({"compression": [tree, {"algorithm": "legonet"}]}))
    required = ["compress", *MODEL, "--data", "digits", "--out", "out", *options, "--config"]
    parser = build_parser()
    assert read_config(parser.parse_args([*required, str(tmp_path / "one.json")])).seed == seed
    sections = merged(parser.parse_args([*required, str(tmp_path / "two.json")]))["compression"]
    assert sections[0]["seed"] == seed


def test_torchrun_chooses_the_device(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": 0}
    for name, value in {**launched, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))
    own = "cuda" if torch.cuda.is_available() else "cpu"
    words = ["finetune", str(tree), "--data", "digits", "--epochs", "1", "--out", str(tmp_path / "tuned")]
    for device in ("meta", "nonsense", "cpu:0" if own == "cuda" else "cuda:5"):
        assert main([*words, "--device", device]) == 2
        error = capsys.readouterr().err
        assert f"--device {device}: under torchrun each process has a device of its own, here {own}" in error
    assert not (tmp_path / "tuned").exists()


def test_data_of_another_shape_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "compress",
        *TREE,
        "--data",
        "digits",
        "--out",
        str(tmp_path / "out"),
        "--model",
        "cifar_resnet18",
    ]
    assert main(words) == 2
    assert "does not take one sample of digits, shape (1, 1, 8, 8)" in capsys.readouterr().err
    assert main([*words, "--model-args", json.dumps({**MODEL_ARGS, "num_classes": 7})]) == 2
    assert "the model has 7 classes and digits has 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluate_with_another_model_names_the_tensor(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = json.dumps({**MODEL_ARGS, "width": 0.125})
    assert main(["evaluate", str(tree), "--data", "digits", "--model-args", other]) == 2
    assert "conv1.weight" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_goes_all_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    result = run(capsys, "demo", "--quick", "--out", str(out))
    rows = {row["role"]: row for row in result["networks"]}
    assert set(rows) == {"dense", "sigmab", "twin"}
    assert rows["dense"]["accuracy"] > 0.5
    assert rows["sigmab"]["active_parameters"] < rows["dense"]["active_parameters"] / 2
    assert rows["twin"]["active_parameters"] < rows["sigmab"]["active_parameters"]
    record = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert len(record["channels"]) == 3
    assert len(record["curves"]) == 3
    assert "sigmab demo --quick" in (out / "report.html").read_text(encoding="utf-8")
    # What it left behind is a folder like any other, and says the same again.
    again = run(capsys, "evaluate", str(out), "--data", "digits")
    assert again["networks"] == result["networks"]
    assert again["leaf_shares"] == result["leaf_shares"]


@pytest.mark.slow
def test_two_processes_train_one_tree(tree: Path, tmp_path: Path) -> None:
    """Under torchrun both processes share the work, and one of them writes."""
    tuned = tmp_path / "tuned"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sigmab_plugin"]
    words = ["finetune", str(tree), "--data", "digits", "--epochs", "1", "--no-twin", "--out", str(tuned)]
    words += ["--json", "--threads", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *launch, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # two processes do not share one GPU
    )
    assert done.returncode == 0, done.stderr
    assert [row["role"] for row in json.loads(done.stdout)["networks"]] == ["dense", "sigmab"]
    record = json.loads((tuned / "log.json").read_text())["records"][0]
    # 1,197 training digits, a tenth held back, in whole batches of 32 on each of two processes.
    assert record["samples"] == 1024
    assert sigmab_plugin.load(tuned, cifar_resnet18(**MODEL_ARGS)).leaves == ("0/0", "0/1", "1/0", "1/1")
