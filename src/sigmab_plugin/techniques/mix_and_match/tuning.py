"""Masked fine-tuning: one plain loop, the same for every run of a search."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...tuning.lone_sample import has_lone_sample, lone_sample_refused
from ...tuning.seeding import preserve_random_state, seed_epoch
from ..supervised import LossFunction, module_device, supervised_batches, training_loss
from .config import MixAndMatchConfig
from .masks import MaskKeeper


class DivergenceError(TrainingError):
    """Fine-tuning came to a loss or to weights that are not finite."""


# Runs in several threads may share a loader's sampler and generator: one settles its order at a time.
_SETTLING = threading.Lock()

_REMEDY = "try a lower finetune_lr, and look for NaN in the training data"


@preserve_random_state()
def finetune_masked(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    train_data: Iterable[Any],
    config: MixAndMatchConfig,
    *,
    loss_fn: LossFunction | None = None,
) -> None:
    """Train ``model`` in place for ``config.finetune_epochs`` (cosine by epoch) with ``masks`` held.

    Without masks it is plain fine-tuning, as after structured pruning. Data order and dropout are functions
    of (``config.seed``, epoch). Frozen parameters are not trained: of a frozen weight the masked entries become
    zero, the others stay.

    Raises:
        CalibrationError: no batch of training data.
        DivergenceError: a loss or weights that are not finite.
        TrainingError: every parameter is frozen, or BatchNorm gets a batch of one sample.
    """
    if not config.finetune_epochs:
        MaskKeeper(model, masks)
        model.eval()
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError(
            "mix_and_match: every parameter is frozen; set requires_grad on those to fine-tune, or finetune_epochs to 0"
        )
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters,
            lr=config.finetune_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    else:
        optimizer = torch.optim.AdamW(parameters, lr=config.finetune_lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.finetune_epochs)
    device = module_device(model)
    lone_sample = has_lone_sample(train_data)
    with MaskKeeper(model, masks, optimizer):
        for epoch in range(config.finetune_epochs):
            model.train()
            batches = _batches(train_data, device, seed=config.seed, epoch=epoch)
            for step, (inputs, targets) in enumerate(batches):
                samples = len(targets) if isinstance(targets, Tensor) and targets.ndim else 0
                with lone_sample_refused(model, samples, ahead=lone_sample and epoch == step == 0):
                    loss = training_loss(model, inputs, targets, loss_fn)
                if not torch.isfinite(loss):
                    raise DivergenceError(
                        f"the loss of fine-tuning is not finite at epoch {epoch + 1}, step {step + 1}; {_REMEDY}"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise DivergenceError(f"the weights are not finite after fine-tuning; {_REMEDY}")
    model.zero_grad(set_to_none=True)
    model.eval()


def _batches(
    train_data: Iterable[Any], device: torch.device, *, seed: int, epoch: int
) -> Iterator[tuple[Any, Any]]:
    """The batches of one epoch. A loader settles its order when its first batch is drawn."""
    batches = supervised_batches(train_data, device, name="train_data")
    with _SETTLING:
        seed_epoch(train_data, seed=seed, epoch=epoch)
        first = next(batches)
    return itertools.chain([first], batches)
