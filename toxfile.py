"""tox plug-in: skip, by name, the rows of the matrix for which only torch's huge CUDA build is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.errors import Skip

ANY_TORCH = "SIGMAB_TOX_ANY_TORCH"
CONSTRAINTS = Path(__file__).parent / "constraints" / "torch.txt"


@impl
def tox_on_install(tox_env: ToxEnv, arguments: Any, section: str, of_type: str) -> None:
    """Before anything is installed into a row named after a Python (``py312-...``), look at its torch."""
    if (
        not tox_env.name.startswith("py3")
        or not sys.platform.startswith("linux")
        or os.environ.get(ANY_TORCH)
    ):
        return
    version = _torch_version(str(tox_env.env_python()))  # type: ignore[attr-defined]
    if not version.endswith("+cpu"):
        raise Skip(f"no CPU build of torch here (found: {version or 'none'}); {ANY_TORCH}=1 runs it anyway")


@lru_cache
def _torch_version(python: str) -> str:
    """Version that pip would install, read from metadata alone: nothing is downloaded or installed."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--only-binary", ":all:", "--constraint", str(CONSTRAINTS), "--report", "-", "torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return ""
    return str(json.loads(done.stdout)["install"][0]["metadata"]["version"])
