"""The optimiser of a recipe, with a learning rate of their own for a tree's routers and branches."""

from __future__ import annotations

import torch
from torch import nn

from .objective import leaf_names
from .recipe import TrainRecipe


def _lr_factors(net: nn.Module, recipe: TrainRecipe) -> dict[int, float]:
    """Id of a tree's parameter -> its share of the learning rate, where it is not 1."""
    if not leaf_names(net):
        return {}
    factors = {id(p): recipe.router_lr_factor for p in net.routers.parameters()}  # type: ignore[union-attr, operator]
    for part in (net.specializers, net.heads):
        for key, module in part.items():  # type: ignore[union-attr, operator]
            factor = recipe.branch_lr_factor ** len(key.split("_"))
            factors.update((id(p), factor) for p in module.parameters())
    return factors


def build_optimizer(net: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """Parameters in the network's order, those of one learning rate together."""
    factors = _lr_factors(net, recipe)
    by_factor: dict[float, list[nn.Parameter]] = {}
    for parameter in net.parameters():
        if parameter.requires_grad:
            by_factor.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    groups = [{"params": own, "lr_factor": factor} for factor, own in by_factor.items()]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            groups,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
