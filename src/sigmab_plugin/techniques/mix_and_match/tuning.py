"""Masked fine-tuning: one plain loop, the same for every run of a search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..supervised import LossFunction, module_device, supervised_batches, training_loss
from .config import MixAndMatchConfig
from .masks import MaskKeeper


def finetune_masked(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    train_data: Iterable[Any],
    config: MixAndMatchConfig,
    *,
    loss_fn: LossFunction | None = None,
) -> None:
    """Train ``model`` in place for ``config.finetune_epochs`` (cosine by epoch) with ``masks`` held.

    Without masks it is plain fine-tuning, as after structured pruning.
    """
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters()]
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
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, config.finetune_epochs))
    device = module_device(model)
    with MaskKeeper(model, masks, optimizer):
        for _ in range(config.finetune_epochs):
            model.train()
            for inputs, targets in supervised_batches(train_data, device, name="train_data"):
                loss = training_loss(model, inputs, targets, loss_fn)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
    model.eval()
