"""What the package adds to the imports of its hosts, each repeat in a fresh interpreter.

    python benchmarks/import_time.py [--repeats 15] [--json FILE] [--check]

The cost of the autoload hook is timed where torch calls it, not as the difference of two imports of torch: that
difference drowns in the spread of an import that takes a second. Times are wall clock, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

TIMER = "import time; start = time.perf_counter()\n{timed}\nprint((time.perf_counter() - start) * 1e3)"


@dataclass(frozen=True)
class Case:
    """One thing to time: ``setup`` runs before the clock starts; ``limit`` in ms, None where it is only a floor."""

    name: str
    setup: str
    timed: str
    limit: float | None = None
    autoload: bool = True


CASES = (
    Case("import torch, no hook", "", "import torch", autoload=False),
    Case("import torch", "", "import torch"),
    Case(
        "the hook alone, as torch calls it",
        "import torch\n"
        "from importlib.metadata import entry_points\n"
        "entry, = (e for e in entry_points(group='torch.backends') if e.name == 'sigmab_plugin')",
        "entry.load()()",
        limit=1.0,
        autoload=False,
    ),
    Case("import torch_pruning after torch, no hook", "import torch", "import torch_pruning", autoload=False),
    Case("import torch_pruning after torch", "import torch", "import torch_pruning"),
    Case(
        "registering with torch_pruning alone",
        "import torch_pruning\nfrom sigmab_plugin.hosts.autoload import install",
        "install()",
        limit=1.0,
        autoload=False,
    ),
    Case(
        "import sigmab_plugin after torch",
        "import torch",
        "import sigmab_plugin",
        limit=100.0,
        autoload=False,
    ),
    Case("SigmaBPruner at first use", "import torch, torch_pruning as tp", "tp.pruner.SigmaBPruner"),
    Case(
        "sigmab --help",
        "import subprocess, sys",
        "subprocess.run([sys.executable, '-m', 'sigmab_plugin', '--help'], stdout=subprocess.DEVNULL, check=True)",
        limit=500.0,
    ),
)


def measure(case: Case) -> float:
    """Milliseconds of one run of ``case`` in a fresh interpreter."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(case.autoload)),
    }
    environment.pop(
        "PYTHONDONTWRITEBYTECODE", None
    )  # an installer compiles; a compile on every import is not ours
    code = f"{case.setup}\n{TIMER.format(timed=case.timed)}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    """Print the table; with ``--check`` the exit code is 1 where a median is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="fresh interpreters per case")
    parser.add_argument("--json", type=Path, help="write the times to this file too")
    parser.add_argument("--check", action="store_true", help="fail where a median is over its limit")
    options = parser.parse_args(argv)

    times: dict[str, list[float]] = {case.name: [] for case in CASES}
    for repeat in range(options.repeats + 1):
        for case in CASES:  # in turn, so that a busy moment of the machine hits every case
            elapsed = measure(case)
            if repeat:  # the first round fills the caches of byte code and of the file system
                times[case.name].append(elapsed)

    print(f"{'ms':<44}{'min':>10}{'median':>10}{'max':>10}{'limit':>10}")
    over = []
    for case in CASES:
        values = times[case.name]
        median = statistics.median(values)
        limit = "" if case.limit is None else f"{case.limit:.0f}"
        print(f"{case.name:<44}{min(values):>10.2f}{median:>10.2f}{max(values):>10.2f}{limit:>10}")
        if case.limit is not None and median > case.limit:
            over.append(case.name)
    if over:
        print("over the limit: " + "; ".join(over))
    if options.json is not None:
        report = {
            "command": " ".join(
                ["python", "benchmarks/import_time.py", *(argv if argv is not None else sys.argv[1:])]
            ),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cases": [{**asdict(case), "milliseconds": times[case.name]} for case in CASES],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(options.check and bool(over))


if __name__ == "__main__":
    sys.exit(main())
