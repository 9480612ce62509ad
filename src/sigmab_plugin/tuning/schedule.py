"""Learning rate and router temperature as pure functions of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

from .recipe import TrainRecipe


def learning_rate(recipe: TrainRecipe, step: int, *, steps_per_epoch: int, epochs: int) -> float:
    """Learning rate of iteration ``step`` (from 0) of a run of ``epochs * steps_per_epoch`` iterations.

    Warm-up is linear and reaches ``lr`` with its last iteration. Cosine decays from there to 0; step
    decays by ``step_gamma`` every ``step_epochs`` epochs, counted from the start of the run.
    """
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    if recipe.schedule == "cosine":
        progress = (step - warmup) / max(1, epochs * steps_per_epoch - warmup)
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    if recipe.schedule == "step":
        return recipe.lr * recipe.step_gamma ** (step // steps_per_epoch // recipe.step_epochs)
    return recipe.lr


def router_temperature(recipe: TrainRecipe, epoch: int, *, epochs: int) -> float:
    """Extra router temperature of ``epoch`` (from 0): geometric from ``router_temperature`` to 1.

    It is 1 in the last soft epoch and in all hard ones, so that training ends with the network's own router.
    """
    last = epochs - recipe.hard_epochs - 1
    if recipe.router_temperature == 1.0 or epoch >= last:
        return 1.0
    return float(recipe.router_temperature ** (1.0 - epoch / last))
