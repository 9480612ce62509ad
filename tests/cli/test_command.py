from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sigmab_plugin.cli import COMMANDS, main

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def sigmab(tmp_path: Path) -> Command:
    """Run the command in a process of its own, in an empty folder."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sigmab_plugin", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_help_names_every_command_without_torch() -> None:
    code = (
        "import sys, sigmab_plugin.cli as cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit as exit: assert exit.code == 0\n"
        "heavy = {'torch', 'numpy', 'torch_pruning', 'nncf', 'torch_geometric', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


def test_help_costs_little_over_the_interpreter() -> None:
    def seconds(*words: str) -> float:
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            best = min(best, time.perf_counter() - started)
        return best

    # Against a bare interpreter in the same run, so that a busy machine does not decide.
    bare = seconds("-c", "pass")
    assert seconds("-m", "sigmab_plugin", "--help") < max(0.5, 10 * bare)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: sigmab {name}" in text
    assert "--debug" in text
    assert "--json" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import sigmab_plugin

    with pytest.raises(SystemExit):
        main(["--version"])
    assert sigmab_plugin.__version__ in capsys.readouterr().out


def test_an_error_is_one_line_and_exit_code_2(sigmab: Command) -> None:
    done = sigmab("inspect", "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "sigmab: error: no such folder: nowhere; give what `sigmab compress --out` wrote"
    ]


def test_debug_shows_where(sigmab: Command) -> None:
    done = sigmab("inspect", "nowhere", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_json_errors_are_json(sigmab: Command) -> None:
    done = sigmab("inspect", "nowhere", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == "ConfigError"


def test_an_unknown_command_is_refused(sigmab: Command) -> None:
    done = sigmab("shrink")
    assert done.returncode == 2
    assert "invalid choice: 'shrink'" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no_such_net"], "has no 'no_such_net'; it has"),
        (["--model", "no.such.module:net"], "cannot import no.such.module"),
        (["--model", ":foo"], "write package.module:callable"),
        (["--model", "mymodels:"], "write package.module:callable"),
        (["--model", ".x:y"], "write package.module:callable"),
        (["--model", ""], "write package.module:callable"),
        (["--model", "math:Sqrt"], "did you mean sqrt?"),
        (["--model", "mynets.Net"], "for a module of your own write mynets:Net"),
        (["--model", "mynets.py:Net"], "; write mynets:Net"),
        (["--model", "math:pi"], "is not callable"),
        (["--model", "builtins:dict"], "returned a dict, not a torch.nn.Module"),
        (["--model", "cifar_resnet18", "--model-args", "{"], "--model-args is not JSON"),
        (["--model", "cifar_resnet18", "--model-args", '{"depth": 3}'], "does not take these arguments"),
        (["--model", "cifar_resnet18", "--weights", "none.pth"], "no such weights file"),
        (["--model", "cifar_resnet18", "--device", "tpu7"], "device tpu7 cannot be used here"),
        (["--model", "cifar_resnet18", "--levels"], "expected at least one argument"),
    ],
)
def test_bad_models_are_named(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", "--data", "digits", "--head", "fc", "--out", str(tmp_path / "out")]
    words += [] if "--levels" in options else ["--levels", "layer3"]
    try:
        code = main([*words, *options])
    except SystemExit as exit_info:
        code = exit_info.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"input_info": {}}', '"compression" is missing or empty'),
        ('{"compression": [{}]}', 'needs "algorithm"'),
        ('{"algorithm": "quantization"}', "compression[0] (quantization) needs NNCF"),
        ('{"algorithm": "sigmab", "level": ["layer3"]}', "Did you mean 'levels'?"),
        ('{"compression": {"algorithm": "sigmab"}}', "which tree?"),
    ],
)
def test_bad_config_files_are_explained(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(content)
    words = ["--model", "cifar_resnet18", "--data", "digits", "--out", str(tmp_path / "out")]
    assert main(["compress", "--config", str(config), *words]) == 2
    assert message in capsys.readouterr().err
