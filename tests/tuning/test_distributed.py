"""The collectives and the training loop, alone and with two gloo processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.tuning import distributed, finetune

from .launch import WORKERS, launch
from .nets import BALANCED, QUICK, dense, same, samples, state, tree


def test_alone_every_collective_is_the_identity() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    for result in (
        distributed.all_reduce_sum(rows),
        distributed.all_gather_rows(rows),
        distributed.broadcast_tensor(rows),
    ):
        assert torch.equal(result, rows)
        assert result.data_ptr() != rows.data_ptr()
    assert distributed.broadcast_object([1, "a"]) == [1, "a"]
    distributed.barrier()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    launch("quick", folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    launch("training", folder)
    return folder


@pytest.mark.slow
def test_two_processes(quick: Path) -> None:
    seen = [torch.load(quick / "collectives" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    first = torch.arange(6.0).view(3, 2)
    for rank, results in enumerate(seen):
        assert (results["world"], results["rank"], results["main"]) == (2, rank, rank == 0)
        assert results["sum"].tolist() == [2.0, 1.0]
        assert torch.equal(results["rows"], torch.cat([first[:1], first + 100]))
        assert torch.equal(results["empty"], (first[:2] + 100).long())
        assert torch.equal(results["tensor"], first)
        assert results["object"] == {"from": 1, "list": [1, 1]}
        assert results["untouched"] == rank


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tree", "dense"])
def test_two_processes_train_as_one_with_the_same_global_batch(trained: Path, kind: str) -> None:
    """Without BatchNorm a mean of equal halves is the mean of the whole: only rounding differs."""
    folder = trained / kind
    weights = [load_file(folder / f"{rank}.safetensors") for rank in range(2)]
    assert same(*weights)
    assert same(
        weights[0],
        {k[6:]: v for k, v in load_file(folder / "run/last.safetensors").items() if k[:6] == "model."},
    )

    net = tree(norm=False) if kind == "tree" else dense(norm=False)
    batches = DataLoader(TensorDataset(*samples()), batch_size=16)
    history = finetune(net, batches, epochs=2, recipe=BALANCED, val_loader=batches, progress=False)
    for name, value in state(net).items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-3, atol=1e-5, msg=name)
    both = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for record, first, second in zip(history.records, both[0]["records"], both[1]["records"], strict=True):
        assert first["samples"] == record.samples == 96
        for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "leaf_shares"):
            assert first[key] == second[key]
            assert first[key] == pytest.approx(getattr(record, key), rel=1e-4), key


@pytest.mark.slow
def test_a_script_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKERS), str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weights = [load_file(tmp_path / f"{rank}-of-2.safetensors") for rank in range(2)]
    assert same(*weights)
    alone = tree(norm=False)
    with distributed.process_group() as device:
        batches = DataLoader(TensorDataset(*samples()), batch_size=16)
        finetune(alone, batches, epochs=2, recipe=QUICK, device=device, progress=False)
    for name, value in state(alone).items():
        torch.testing.assert_close(weights[0][name], value.cpu(), rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_resume(trained: Path) -> None:
    folder = trained / "resume"
    for rank in range(2):
        assert json.loads((folder / f"{rank}.json").read_text()) == {"same": True, "stopped": 1}


@pytest.mark.slow
def test_a_bad_loss_on_one_rank_stops_both(quick: Path) -> None:
    folder = quick / "diverge"
    for rank in range(2):
        assert "the loss is not finite at epoch 1, step 1" in (folder / f"{rank}.txt").read_text()


@pytest.mark.slow
def test_batchnorm_sums_are_shared(quick: Path) -> None:
    folder = quick / "batchnorm"
    images, _ = samples()
    values = dense()[0][0](images)
    for rank in range(2):
        found = load_file(folder / f"{rank}.safetensors")
        torch.testing.assert_close(found["0.1.running_mean"], values.mean((0, 2, 3)))
        torch.testing.assert_close(found["0.1.running_var"], values.var((0, 2, 3)))


@pytest.mark.slow
def test_synchronised_batchnorm_is_swapped_in_and_out(quick: Path) -> None:
    for rank in range(2):
        seen = json.loads((quick / "synchronised" / f"{rank}.json").read_text())
        assert seen == {"inside": ["SyncBatchNorm"], "shared": True, "restored": True}


@pytest.mark.slow
def test_a_loader_that_is_not_sharded_is_reported(quick: Path) -> None:
    text = (quick / "unsharded" / "0.log").read_text()
    assert text.count("each of the 2 processes trains on all of the data") == 1
