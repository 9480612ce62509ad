"""One training loop for every arm: same optimiser, same schedule, same data order, resumable after a kill."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sigmab_plugin.data import Loader

_log = logging.getLogger(__name__)

#: (model, inputs, labels) -> scalar.
Loss = Callable[[nn.Module, Any, Tensor], Tensor]


@dataclass(frozen=True)
class TrainingRecipe:
    """How a network is trained.

    ``schedule`` is "cosine" (to zero) or "step" (times ``gamma`` each ``step`` epochs); ``amp`` is bfloat16.
    """

    epochs: int
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    step: int = 20
    gamma: float = 0.7
    batch_size: int = 32
    label_smoothing: float = 0.0
    clip: float | None = None
    amp: bool = False
    channels_last: bool = False

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, lr=self.lr, momentum=self.momentum, nesterov=True, weight_decay=self.weight_decay
            )
        raise ValueError(f"optimizer must be 'adam' or 'sgd'; got {self.optimizer!r}")

    def rate(self, epoch: float) -> float:
        """Learning rate after ``epoch`` epochs, a fraction inside one."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1e-3) / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * self.gamma ** (int(epoch) // self.step)
        done = (epoch - self.warmup_epochs) / max(1e-9, self.epochs - self.warmup_epochs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class TrainingLog:
    """What a training run cost and how it went; wall time adds up over resumed runs."""

    epochs: int
    samples: int
    wall_s: float
    history: list[dict[str, float]]


def fit(
    model: nn.Module,
    loader: Loader,
    recipe: TrainingRecipe,
    loss: Loss,
    *,
    out: Path,
    seed: int,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    validate_every: int = 1,
    device: str = "cpu",
) -> TrainingLog:
    """Train in place; a second call with the same ``out`` continues at the last whole epoch.

    Randomness (order, augmentation, dropout) depends on (seed, epoch) alone, so a resumed run equals an
    unbroken one. ``out`` gets ``last.pt``, ``log.csv`` and ``log.json``. No choice is made by validation:
    the last epoch's weights count.
    """
    out.mkdir(parents=True, exist_ok=True)
    model.to(device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = recipe.build_optimizer(model)
    log = TrainingLog(epochs=0, samples=0, wall_s=0.0, history=[])
    state_file = out / "last.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        if TrainingRecipe(**state["recipe"]) != recipe or state["seed"] != seed:
            raise ValueError(
                f"{state_file} comes from another recipe or seed; remove it or choose another --out"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = TrainingLog(**json.loads(state["log"]))
    for epoch in range(log.epochs, recipe.epochs):
        begin = time.perf_counter()
        loader.set_epoch(epoch)
        torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
        model.train()
        total = torch.zeros((), device=device)
        seen = 0
        steps = len(loader)
        for step, (inputs, labels) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch + step / steps)
            optimizer.zero_grad(set_to_none=True)
            inputs = to_device(inputs, device)
            if recipe.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device, dtype=torch.bfloat16, enabled=recipe.amp):
                value = loss(model, inputs, labels.to(device))
            value.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            total += value.detach() * len(labels)
            seen += len(labels)
        log.epochs = epoch + 1
        log.samples += seen
        log.wall_s += time.perf_counter() - begin
        row = {"epoch": epoch + 1, "loss": float(total) / seen, "wall_s": round(log.wall_s, 1)}
        if validate is not None and ((epoch + 1) % validate_every == 0 or epoch + 1 == recipe.epochs):
            row.update(validate(model))
        log.history.append(row)
        print(f"{out.name}: " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)
        if not math.isfinite(row["loss"]):
            raise RuntimeError(f"{out}: the loss is not finite after epoch {epoch + 1}; lower lr")
        _save(
            state_file,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "log": json.dumps(asdict(log)),
                "recipe": asdict(recipe),
                "seed": seed,
            },
        )
        _write_log(out, log)
    return log


def to_device(inputs: Any, device: str) -> Any:
    """A tensor or a tuple of tensors on the device."""
    if isinstance(inputs, tuple):
        return tuple(part.to(device) for part in inputs)
    return inputs.to(device)


def call(model: nn.Module, inputs: Any) -> Tensor:
    """A tuple is positional arguments, as everywhere in the package."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def predictions(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], *, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) in evaluation mode; the mode is put back."""
    mode = model.training
    model.eval()
    logits, labels = [], []
    with torch.no_grad():
        for inputs, target in batches:
            logits.append(call(model, to_device(inputs, device)).float().cpu())
            labels.append(target)
    model.train(mode)
    return torch.cat(logits), torch.cat(labels)


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Overall and mean-class accuracy in percent."""
    correct = (logits.argmax(1) == labels).double()
    classes = labels.unique()
    per_class = torch.stack([correct[labels == c].mean() for c in classes])
    return {"accuracy": 100 * correct.mean().item(), "mean_class_accuracy": 100 * per_class.mean().item()}


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    torch.save(state, partial)
    os.replace(partial, path)


def _write_log(out: Path, log: TrainingLog) -> None:
    (out / "log.json").write_text(json.dumps(asdict(log), indent=1))
    columns = list(dict.fromkeys(key for row in log.history for key in row))
    with open(out / "log.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(log.history)
