"""The optimiser of a recipe, with rates of their own for a tree's routers and branches."""

from __future__ import annotations

import torch
from torch import nn

from .objective import leaf_names
from .recipe import TrainRecipe


def _factors(net: nn.Module, recipe: TrainRecipe) -> dict[int, tuple[float, float]]:
    """Id of a tree's parameter -> its factors on learning rate and weight decay, where they are not 1."""
    if not leaf_names(net):
        return {}
    factors = {id(p): (recipe.router_lr_factor, 1.0) for p in net.routers.parameters()}  # type: ignore[union-attr, operator]
    for part in (net.specializers, net.heads):
        for key, module in part.items():  # type: ignore[union-attr, operator]
            level = len(key.split("_"))
            own = (recipe.branch_lr_factor**level, recipe.branch_weight_decay_factor**level)
            factors.update((id(p), own) for p in module.parameters())
    return factors


def build_optimizer(net: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """Parameters in the network's order, those of one learning rate and weight decay together."""
    factors = _factors(net, recipe)
    by_factors: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
            by_factors.setdefault(factors.get(id(parameter), (1.0, 1.0)), []).append(parameter)
    groups = [
        {"params": own, "lr_factor": lr, "weight_decay": decay * recipe.weight_decay}
        for (lr, decay), own in by_factors.items()
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr)
