"""What importing the package costs and loads, in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sigmab_plugin

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
HEAVY = (
    "torch",
    "numpy",
    "torch_pruning",
    "nncf",
    "torch_geometric",
    "onnx",
    "openvino",
    "matplotlib",
    "sklearn",
)


def test_import_is_light(run_python: RunPython) -> None:
    done = run_python(
        "import sys, sigmab_plugin; print(*{name.partition('.')[0] for name in sys.modules}); "
        "print(*(name for name in sys.modules if name.startswith('sigmab_plugin')))"
    )
    packages, ours = (line.split() for line in done.stdout.splitlines())
    assert not set(packages) & set(HEAVY)
    assert ours == ["sigmab_plugin"]


def test_core_loads_no_optional_host(run_python: RunPython) -> None:
    """Everything public, torch and Torch-Pruning included, is reached without NNCF or torch-geometric."""
    done = run_python(
        "import sys, sigmab_plugin\n"
        "for name in sigmab_plugin.__all__: getattr(sigmab_plugin, name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    assert "torch" in done.stdout.split()
    assert not set(done.stdout.split()) & {
        "nncf",
        "torch_geometric",
        "onnx",
        "openvino",
        "matplotlib",
        "sklearn",
    }


def test_public_names_resolve_and_are_declared_once() -> None:
    assert sorted(sigmab_plugin.__all__) == sigmab_plugin.__all__
    assert set(sigmab_plugin.__all__) <= set(dir(sigmab_plugin))
    for name in sigmab_plugin.__all__:
        assert getattr(sigmab_plugin, name) is not None
    # the TYPE_CHECKING block names the same things, so editors and mypy see what users get
    tree = ast.parse(Path(sigmab_plugin.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported | {"__version__"} == set(sigmab_plugin.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SigmaC'"):
        sigmab_plugin.SigmaC  # noqa: B018


def test_help_needs_no_torch(run_python: RunPython) -> None:
    done = run_python(
        "import sys\n"
        "from sigmab_plugin.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = done.stdout.rpartition("LOADED")[2].split()
    assert not set(loaded) & set(HEAVY)


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sigmab_plugin", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert sigmab_plugin.__version__ in done.stdout
