"""The loop on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sigmab_plugin.errors import TrainingError
from sigmab_plugin.tuning import evaluate, finetune, reestimate_batchnorm

from .nets import QUICK, dense, loader, samples, tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("amp", [False, True])
def test_a_tree_learns_from_a_teacher_on_the_cpu(amp: bool) -> None:
    net, teacher = tree(), dense()
    recipe = QUICK.replace(amp=amp, bn_reestimation=True)
    history = finetune(
        net,
        loader(),
        epochs=8,
        recipe=recipe,
        val_loader=loader(64, seed=1),
        teacher=teacher,
        device="cuda",
        progress=False,
    )
    assert history.best_accuracy is not None
    assert history.best_accuracy > 0.7
    assert next(net.parameters()).is_cuda
    assert not next(teacher.parameters()).is_cuda


def test_resuming_restores_weights_and_optimiser(tmp_path: Path) -> None:
    options = {"epochs": 3, "recipe": QUICK, "device": "cuda", "progress": False}
    whole, first, second = tree(), tree(), tree()
    finetune(whole, loader(), **options)  # type: ignore[arg-type]
    finetune(first, loader(), checkpoint_dir=tmp_path, max_seconds=0.0, **options)  # type: ignore[arg-type]
    finetune(second, loader(), checkpoint_dir=tmp_path, **options)  # type: ignore[arg-type]
    for (name, value), (_, expected) in zip(
        second.state_dict().items(), whole.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-3, msg=name)


def test_the_first_bad_step_is_named_although_the_host_looks_later() -> None:
    images, targets = samples(16)
    bad = images.clone()
    bad[0] = float("nan")
    batches = [(images, targets)] * 4 + [(bad, targets)] + [(images, targets)] * 30
    with pytest.raises(TrainingError, match="epoch 1, step 5 "):
        finetune(tree(norm=False), batches, epochs=1, recipe=QUICK, device="cuda", progress=False)


def test_evaluation_and_batchnorm_agree_with_the_cpu() -> None:
    on_cpu, on_gpu = tree(), tree().cuda()
    for net in (on_cpu, on_gpu):
        reestimate_batchnorm(net, loader(shuffle=False))
    for (name, value), (_, expected) in zip(
        on_gpu.state_dict().items(), on_cpu.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(value.cpu(), expected, rtol=1e-2, atol=1e-3, msg=name)
    assert evaluate(on_gpu, loader()).leaf_shares == pytest.approx(
        evaluate(on_cpu, loader()).leaf_shares, abs=0.03
    )
