"""What stands in a folder: whose code its record may call, and no file of an earlier network beside a new one."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sigmab_plugin.cli import build_parser, main
from sigmab_plugin.cli.folder import is_own_model, read_record
from sigmab_plugin.cli.options import build_model

MODEL = "user_net_of_test_folder:make"
TREE = ["--levels", "l1", "l2", "--head", "head", "--projection-dim", "4"]
SOURCE = """
from collections import OrderedDict
from torch import nn
def make(width=8):
    block = lambda: nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
    stem = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
    return nn.Sequential(OrderedDict(stem=stem, l1=block(), l2=block(), head=nn.Linear(width, 10)))
"""
LEFT_OVER = (
    "nncf.json", "compression_state.json", "legonet.safetensors", "mix_and_match.json", "twin.safetensors",
    "log.json", "log.csv", "twin-log.json", "twin-log.csv",
)  # fmt: skip


@pytest.fixture(autouse=True)
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of the user's in it."""
    (tmp_path / "user_net_of_test_folder.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    yield tmp_path
    sys.modules.pop("user_net_of_test_folder", None)


def weights(width: int = 8, seed: int = 0) -> str:
    torch.manual_seed(seed)
    path = Path.cwd() / f"dense-{width}-{seed}.safetensors"
    save_file(build_model(MODEL, {"width": width}).state_dict(), path)
    return str(path)


def compress(out: str, *words: str) -> int:
    words = ("--model", MODEL, "--data", "digits", "--samples", "256", "--out", out, *TREE, *words)
    return main(["compress", "--threads", "1", "--quiet", *words])


def litter(folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    for name in LEFT_OVER:
        (Path(folder) / name).write_text("of an earlier network")


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()} - {"checkpoints"}


def test_a_file_in_the_way_is_seen_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("mine")
    for words in (["compress", "--model", MODEL, *TREE], ["finetune", "tree"]):
        assert main([*words, "--data", "digits", "--out", "taken"]) == 2
        assert "--out taken is a file; name a folder" in capsys.readouterr().err


# ---------------------------------------------------------------- whose code


def test_a_record_runs_no_code_by_itself(users_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder from somebody else: its record names a callable, and evaluate, finetune and export would call it."""
    assert compress("tree", "--weights", weights()) == 0
    record = json.loads(Path("tree/sigmab.json").read_text())
    record.update(model="os:mkdir", model_args={"path": str(users_folder / "owned")})
    Path("tree/sigmab.json").write_text(json.dumps(record))
    for words in (
        ["evaluate", "tree", "--data", "digits"],
        ["finetune", "tree", "--data", "digits", "--out", "tuned"],
        ["export", "tree", "--to", "bundle", "--input-shape", "1,8,8"],
    ):
        assert main(words) == 2
        assert "names the model os:mkdir, code that is not sigmab_plugin's" in capsys.readouterr().err
    assert not (users_folder / "owned").exists()


def test_the_error_has_the_line_to_type(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert compress("tree", "--weights", weights(6), "--model-args", '{"width": 6}') == 0
    words = ["evaluate", "tree", "--data", "digits", "--quiet", "--threads", "1"]
    capsys.readouterr()
    assert main(words) == 2
    line = capsys.readouterr().err.partition("If it is yours: ")[2].partition(". If you trust")[0]
    typed = shlex.split(line)
    assert typed == ["sigmab", *words, "--model", MODEL, "--model-args", '{"width": 6}']
    assert main(typed[1:]) == 0
    printed = capsys.readouterr().out
    assert main([*words, "--trust-record"]) == 0
    assert capsys.readouterr().out == printed
    assert main([*words, "--model", MODEL]) == 2
    assert """add --model-args '{"width": 6}'""" in caplog.text
    assert "SigmaB" in printed


@pytest.mark.parametrize(
    ("spec", "own"),
    [
        ("cifar_resnet18", True),
        ("sigmab_plugin.models:DSCNN", True),
        ("sigmab_plugin.models.ds_cnn:DSCNN", True),
        ("sigmab_plugin.cli.demo:demo_network", True),
        ("resnet.torch.hub.load", False),
        ("sigmab_plugin.models.resnet:torch.hub.load", False),
        ("sigmab_plugin.models:importlib.import_module", False),
        # Of this package, and calls what its arguments name.
        ("sigmab_plugin.cli.options:build_model", False),
        ("sigmab_plugin.cli:main", False),
        ("sigmab_plugin.models_of_mine:DSCNN", False),
        ("os:system", False),
        ("torch.nn:Linear", False),
    ],
)
def test_models_that_need_no_word_of_the_user(spec: str, own: bool) -> None:
    assert is_own_model(spec) == own


def test_a_folder_of_this_packages_models_needs_no_model(users_folder: Path) -> None:
    folder = users_folder / "tree"
    folder.mkdir()
    record = {
        "format": "sigmab-run",
        "model": "cifar_resnet18",
        "model_args": {},
        "weights": None,
        "command": [],
    }
    (folder / "sigmab.json").write_text(json.dumps(record))
    args = build_parser().parse_args(["evaluate", str(folder), "--data", "digits"])
    assert read_record(folder, args).model == "cifar_resnet18"


# ---------------------------------------------------------------- whose files


def test_compress_leaves_nothing_of_an_earlier_network(capsys: pytest.CaptureFixture[str]) -> None:
    litter("tree")
    assert compress("tree", "--weights", weights()) == 0
    assert names("tree") == {"plan.json", "model.safetensors", "sigmab.json"}
    assert compress("tree", "--weights", weights(), "--twin") == 0
    assert "twin.safetensors" in names("tree")
    assert compress("tree", "--weights", weights(seed=2)) == 0
    assert names("tree") == {"plan.json", "model.safetensors", "sigmab.json"}
    capsys.readouterr()
    assert main(["evaluate", "tree", "--model", MODEL, "--data", "digits", "--json", "--threads", "1"]) == 0
    assert [row["role"] for row in json.loads(capsys.readouterr().out)["networks"]] == ["dense", "sigmab"]


def test_compress_from_a_file_leaves_nothing_of_an_earlier_network() -> None:
    litter("tree")
    section = {"algorithm": "legonet", "codebook_size": 4, "block_size": 2}
    Path("lego.json").write_text(json.dumps({"compression": section}))
    words = ["--model", MODEL, "--weights", weights(), "--data", "digits", "--samples", "64", "--quiet"]
    assert main(["compress", *words, "--config", "lego.json", "--out", "tree", "--threads", "1"]) == 0
    assert names("tree") == {"model.safetensors", "sigmab.json", "legonet.safetensors"}
    assert Path("tree/legonet.safetensors").read_bytes() != b"of an earlier network"


def test_finetune_leaves_nothing_of_an_earlier_network() -> None:
    assert compress("tree", "--weights", weights(), "--twin") == 0
    litter("tuned")
    words = [
        "finetune",
        "tree",
        "--model",
        MODEL,
        "--data",
        "digits",
        "--epochs",
        "1",
        "--quiet",
        "--threads",
        "1",
    ]
    own = {"plan.json", "model.safetensors", "sigmab.json", "log.json", "log.csv"}
    twins = {"twin.safetensors", "twin-log.json", "twin-log.csv"}
    assert main([*words, "--out", "tuned"]) == 0
    assert names("tuned") == own | twins
    assert json.loads(Path("tuned/log.json").read_text())["records"][0]["epoch"] == 1
    assert main([*words, "--out", "tuned", "--no-twin"]) == 0
    assert names("tuned") == own
