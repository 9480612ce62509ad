"""What one call of fine-tuning will do: its recipe, its epochs, and whether the network can learn by it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, TrainingError
from .distributed import world_size
from .recipe import TrainRecipe, as_recipe

logger = logging.getLogger(__name__)


def settings_of(
    net: nn.Module, given: str | TrainRecipe, epochs: int | None, teacher: nn.Module | None, loader: Any
) -> tuple[TrainRecipe, int]:
    """Recipe and epochs as they will be used.

    Raises:
        ConfigError: options that contradict each other.
        TrainingError: nothing can be trained.
    """
    recipe = as_recipe(given)
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 1:
        raise ConfigError(f"epochs must be at least 1; got {epochs}")
    if isinstance(given, str):
        recipe = recipe.fitted(epochs)
        _check_batches(recipe, given, loader)
    if recipe.warmup_epochs >= epochs:
        logger.warning(
            "a warm-up of %g epochs leaves none of the %d to train at the learning rate asked for: give a smaller "
            "warmup_epochs or more epochs",
            recipe.warmup_epochs,
            epochs,
        )
    if recipe.hard_epochs > epochs:
        raise ConfigError(f"hard_epochs {recipe.hard_epochs} are more than the {epochs} epochs of the run")
    if teacher is None and recipe.distillation_weight:
        raise ConfigError(
            "the recipe distils (distillation_weight > 0) but there is no teacher; give teacher="
        )
    if teacher is not None and not recipe.distillation_weight:
        logger.info("a teacher is given and the recipe sets no distillation_weight: using 1")
        recipe = recipe.replace(distillation_weight=1.0)
    _check_trainable(net)
    return recipe, epochs


def _check_batches(recipe: TrainRecipe, name: str, loader: Any) -> None:
    """A rate that is meant for much larger batches lets the routers of a tree run off to one leaf."""
    size = getattr(loader, "batch_size", None)
    if recipe.optimizer != "sgd" or not isinstance(size, int):
        return
    size *= world_size()
    if not recipe.batch_size / 2 < size < recipe.batch_size * 2:
        logger.warning(
            "recipe %r has a learning rate of %g for batches of %d, and these have %d: in proportion it would be %.3g, "
            "recipe=as_recipe(%r).for_batches(%d)",
            name,
            recipe.lr,
            recipe.batch_size,
            size,
            recipe.for_batches(size).lr,
            name,
            size,
        )


def _check_trainable(net: nn.Module) -> None:
    """Weights that are frozen for inference stay so in a tree that is made of them, but for its routers."""
    sizes = {True: 0, False: 0}
    for parameter in net.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    if not sizes[True]:
        raise TrainingError("the network has no trainable parameter; set requires_grad on those to train")
    if sizes[False] > sizes[True]:
        logger.warning(
            "%d of %d parameters do not train: they have requires_grad False, perhaps as the dense network had; "
            "net.requires_grad_(True) trains them all",
            sizes[False],
            sizes[True] + sizes[False],
        )


def usable(device: torch.device | str) -> torch.device:
    """A device that this machine has.

    Raises:
        ConfigError: it has none of that name.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device} cannot be used here ({str(error).splitlines()[0]}); try cpu"
        ) from error
    return found
