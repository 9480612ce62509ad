"""Two processes with half of the calibration data each build the tree that one builds from all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sigmab_plugin import load

from ..zoo import CASES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "repair"),
    [("mlp", "none"), ("resnet18", "none"), ("resnet18", "least_squares"), ("pointnet2", "least_squares")],
)
def test_two_processes_build_the_same_tree(name: str, repair: str, tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("restructure_worker.py"))
    worker = [sys.executable, script, name, repair, str(tmp_path)]
    ranks = [
        subprocess.Popen([*worker, str(rank), "2"], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(errors)
    subprocess.run([*worker, "0", "1"], check=True, timeout=240)
    case = next(case for case in CASES if case.name == name)
    alone, *both = (load(tmp_path / folder, case.make()) for folder in ("1-0", "2-0", "2-1"))
    for other in both:
        assert {p: b.keep for p, b in other.plan.branches.items()} == {
            p: b.keep for p, b in alone.plan.branches.items()
        }
        assert {p: s.samples for p, s in other.plan.splits.items()} == {
            p: s.samples for p, s in alone.plan.splits.items()
        }
        for (key, tensor), (_, expected) in zip(
            other.state_dict().items(), alone.state_dict().items(), strict=True
        ):
            assert torch.allclose(tensor, expected, atol=1e-6 if repair == "none" else 1e-4), key
    for (key, tensor), (_, expected) in zip(
        both[0].state_dict().items(), both[1].state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, expected), key
    twin, *others = (
        torch.load(tmp_path / f"twin-{folder}", weights_only=True) for folder in ("1-0", "2-0", "2-1")
    )
    for other in others:
        for key, tensor in other.items():
            assert torch.allclose(tensor, twin[key], atol=1e-6 if repair == "none" else 1e-4), key
