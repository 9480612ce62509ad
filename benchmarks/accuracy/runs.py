"""Stages of an experiment: train the dense network, make an arm from it, fine-tune, test once, write the result."""

from __future__ import annotations

import functools
import json
import platform
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sigmab_plugin import SigmaBNet, finetune
from sigmab_plugin.counting import macs, parameter_count, storage_bytes
from sigmab_plugin.report.provenance import provenance
from sigmab_plugin.tuning import (
    Evaluation,
    History,
    TrainRecipe,
    evaluate,
    load_weights,
    reestimate_batchnorm,
)

from .arms import build_arm, calibration
from .experiments import Experiment
from .robustness import rare_class_accuracy, robustness

FORMAT = 1


@dataclass(frozen=True)
class Session:
    """What one call of the benchmark works with."""

    name: str
    recipe: dict[str, Any]
    experiment: Experiment
    out: Path
    results: Path
    command: list[str]
    device: str
    max_seconds: float | None

    def train(
        self, net: nn.Module, settings: dict[str, Any], folder: Path, *, seed: int, teacher: nn.Module | None
    ) -> History:
        """Resumable; order and augmentation depend on the seed alone, so arms of one seed see the same batches."""
        recipe = TrainRecipe(**settings)
        return finetune(
            net,
            self.experiment.train_loader(batch_size=recipe.batch_size, seed=seed),
            recipe=recipe,
            epochs=recipe.epochs,
            val_loader=self.experiment.batches(self.experiment.val),
            teacher=teacher,
            device=self.device,
            checkpoint_dir=folder,
            seed=seed,
            progress=False,
            max_seconds=self.max_seconds,
        )


def dense_stage(session: Session, seed: int) -> bool:
    """Train the dense network of ``seed``; True once it is complete."""
    folder = session.out / f"dense-seed{seed}"
    result = _result_path(session, "dense", seed)
    if result.exists() and (folder / "last.safetensors").exists():
        return True
    model = session.experiment.model(seed)
    history = session.train(model, session.recipe["dense"], folder, seed=seed, teacher=None)
    if history.complete:
        val_accuracy = history.last.val_accuracy or 0.0
        finish = functools.partial(_finish, session, "dense", model, history, val_accuracy=val_accuracy)
        finish(seed=seed, dense_seed=seed, extra={})
    return history.complete


def arm_stage(session: Session, arm: str, *, seed: int, dense_seed: int) -> bool:
    """Restructure the trained dense network, fine-tune, test; True once the result is written."""
    if _result_path(session, arm, seed).exists():
        return True
    dense = load_dense(session, dense_seed)
    settings = session.recipe["arms"][arm]
    torch.manual_seed(seed)
    begin = time.perf_counter()
    net = build_arm(session.experiment, session.recipe, settings, dense, seed=seed, device=session.device)
    built = time.perf_counter() - begin
    before = _val_accuracy(session, net)
    training = {**session.recipe["finetune"], **settings.get("train", {})}
    extra = {
        "restructure_seconds": round(built, 2),
        "val_accuracy_before_finetuning": round(100 * before, 3),
    }
    finish = functools.partial(_finish, session, arm, net, seed=seed, dense_seed=dense_seed, extra=extra)
    if not training["epochs"]:
        val_accuracy = before
        if training.get("bn_reestimation"):
            data = calibration(session.experiment, session.recipe, seed, session.device)
            reestimate_batchnorm(net, data)
            val_accuracy = _val_accuracy(session, net)
        finish(None, val_accuracy=val_accuracy)
        return True
    teacher = dense if training.get("distillation_weight") else None
    folder = session.out / f"{arm}-seed{seed}"
    history = session.train(net, training, folder, seed=seed, teacher=teacher)
    if history.complete:
        finish(history, val_accuracy=history.last.val_accuracy or 0.0)
    return history.complete


def load_dense(session: Session, seed: int) -> nn.Module:
    """The dense network after its last epoch."""
    file = session.out / f"dense-seed{seed}" / "last.safetensors"
    if not file.exists() or not _result_path(session, "dense", seed).exists():
        raise SystemExit(f"{file.parent}: no finished dense network; run --stage dense first")
    model = session.experiment.model(seed)
    load_weights(file, model)
    return model.eval()


def _val_accuracy(session: Session, net: nn.Module) -> float:
    return evaluate(net, session.experiment.batches(session.experiment.val), device=session.device).accuracy


def _result_path(session: Session, arm: str, seed: int) -> Path:
    return session.results / session.name / f"{arm}-seed{seed}.json"


def _finish(
    session: Session,
    arm: str,
    net: nn.Module,
    history: History | None,
    *,
    val_accuracy: float,
    seed: int,
    dense_seed: int,
    extra: dict[str, Any],
) -> None:
    """Evaluate on the test part, once, with the last epoch's weights, and write the result.

    ``history`` is None for a network that is not fine-tuned.
    """
    experiment = session.experiment
    test = evaluate(net, experiment.batches(experiment.test), device=session.device)
    net.to("cpu").eval()
    record = {
        "format": FORMAT,
        "experiment": session.name,
        "note": session.recipe["note"],
        "arm": arm,
        "seed": seed,
        "dense_seed": dense_seed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "test": _accuracies(test, experiment),
        "robustness": robustness(net, experiment),
        "val_accuracy": round(100 * val_accuracy, 3),
        "counts": counts(net, experiment.example(1)),
        "epochs": len(history.records) if history else 0,
        "train_samples": sum(r.samples for r in history.records) if history else 0,
        "train_seconds": round(history.seconds, 1) if history else 0.0,
        **extra,
        "recipe": session.recipe,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        **{key.lower(): value for key, value in provenance(session.command).items()},
    }
    target = _result_path(session, arm, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(target)
    print(f"{arm} seed {seed}: test {record['test']}", flush=True)


def _accuracies(result: Evaluation, experiment: Experiment) -> dict[str, Any]:
    record: dict[str, Any] = {
        "samples": result.samples,
        "accuracy": round(100 * result.accuracy, 3),
        "mean_class_accuracy": round(100 * result.mean_class_accuracy, 3),
        "worst_class_accuracy": round(100 * min(result.class_accuracy), 3),
        "rare_class_accuracy": round(100 * rare_class_accuracy(result, experiment), 3),
    }
    if result.leaf_shares:
        record["leaf_shares"] = [round(share, 4) for share in result.leaf_shares]
        record["balance"] = round(result.balance or 0.0, 4)
    return record


def counts(net: nn.Module, example: Any) -> dict[str, int]:
    """Parameters, multiply-accumulates and bytes for one sample; active is the largest path."""
    if isinstance(net, SigmaBNet):
        parameters, cost = net.parameter_counts(), net.macs(example)
        paths = [storage_bytes(*(m for _, m in net.path_modules(leaf))) for leaf in net.leaves]
        return {
            "active_parameters": parameters.active,
            "stored_parameters": parameters.total,
            "active_macs": cost.active,
            "active_bytes": max(paths),
            "stored_bytes": storage_bytes(net),
        }
    total, size = parameter_count(net), storage_bytes(net)
    return {
        "active_parameters": total,
        "stored_parameters": total,
        "active_macs": macs(net, example),
        "active_bytes": size,
        "stored_bytes": size,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
