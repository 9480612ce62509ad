"""Shared by every test: few threads, and a way to run code in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

# A shared machine may be busy: how long an example takes says nothing about the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

os.environ.setdefault("OMP_NUM_THREADS", "1")

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Small models run slower on many threads than on one, and tests run beside each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """``run_python(code, env={...}, path=[...])`` -> the finished process; the code must exit with 0.

    ``path`` goes to the front of PYTHONPATH; a value None in ``env`` removes the variable.
    """

    def run(
        code: str,
        *,
        env: Mapping[str, str | None] | None = None,
        path: list[Path] | None = None,
        check: bool = True,
        flags: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name, value in (env or {}).items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        if path:
            parts = [*map(str, path), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
        done = subprocess.run(
            [sys.executable, *flags, "-c", code],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
