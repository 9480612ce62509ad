"""How a report was made: command, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__


def provenance(command: Sequence[str] = (), **more: Any) -> dict[str, str]:
    """Label -> text for a report's last section; ``more`` is added in front, None left out."""
    record = {"command": shlex.join(command)} if command else {}
    record.update({label.replace("_", " "): str(value) for label, value in more.items() if value is not None})
    record["sigmab-plugin"] = __version__
    for package in ("torch", "torch-pruning", "torch-geometric", "nncf"):
        try:
            record[package] = version(package)
        except PackageNotFoundError:
            continue
    record["Python"] = platform.python_version()
    record["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors{_gpu()}"
    return record


def _gpu() -> str:
    import torch

    return f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
