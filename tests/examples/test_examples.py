"""The examples run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_quickstart_then_hard_routing(tmp_path: Path) -> None:
    out = run("quickstart_torch_pruning.py", "--epochs", "3", "--out", "tree", cwd=tmp_path)
    dense, tree = (line for line in out.splitlines() if line.startswith(("dense ", "SigmaB ")))
    assert float(dense.split()[1].rstrip("%")) > 80
    assert float(tree.split()[1].rstrip("%")) > 80
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {
        "plan.json", "model.safetensors", "dense.safetensors",
    }  # fmt: skip

    out = run("hard_routing.py", "tree", cwd=tmp_path)
    difference = next(line for line in out.splitlines() if line.startswith("batch against"))
    assert float(difference.rsplit(" ", 1)[1]) < 1e-4
    for part in ("digits per leaf", "backbone", "routers.root", "stored in all"):
        assert part in out
