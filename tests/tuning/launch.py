"""Starts the ranks of a distributed test: gloo processes that meet through a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKERS = Path(__file__).with_name("distributed_workers.py")


def launch(worker: str, folder: Path, *, processes: int = 2) -> None:
    """Run the function ``worker`` of ``distributed_workers.py`` as ``worker(rank, folder)``."""
    command = [sys.executable, str(WORKERS), worker, str(folder), str(processes)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(processes)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise AssertionError("\n".join(outputs))
