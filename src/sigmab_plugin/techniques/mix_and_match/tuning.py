"""Masked fine-tuning: one plain loop, the same for every run of a search."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...tuning.seeding import preserve_random_state, seed_epoch
from ..supervised import LossFunction, module_device, supervised_batches, training_loss
from .config import MixAndMatchConfig
from .masks import MaskKeeper

# Runs in several threads may share a loader's sampler and generator: one settles its order at a time.
_SETTLING = threading.Lock()


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
        TrainingError: every parameter is frozen.
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
    with MaskKeeper(model, masks, optimizer):
        for epoch in range(config.finetune_epochs):
            model.train()
            for inputs, targets in _batches(train_data, device, seed=config.seed, epoch=epoch):
                loss = training_loss(model, inputs, targets, loss_fn)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
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
