"""The training objective as a module, so that data-parallel training synchronises what its forward uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..counting import as_arguments
from .batches import check_logits, check_targets, class_indices
from .distributed import all_reduce_sum
from .losses import balance_loss, dense_loss, hard_leaf, soft_routing_loss, temper
from .recipe import TrainRecipe


def is_tree(net: nn.Module) -> bool:
    """Whether ``net`` is trained with soft routing; any other module gets plain cross-entropy."""
    return hasattr(net, "forward_leaves")


def leaf_names(net: nn.Module) -> tuple[str, ...]:
    """Leaf paths of a tree; none for a plain module."""
    return tuple(net.leaves) if is_tree(net) else ()  # type: ignore[arg-type]


class Objective(nn.Module):
    """``forward`` gives the loss and the batch's counts; what varies from epoch to epoch is an attribute.

    Attributes:
        net: a tree (``forward_leaves``) or any module whose output is logits (B, C).
        router_temperature: extra softening of the router in this epoch.
        straight_through: hard routing in the forward value, in this epoch.
        classes: number of classes, known after the first batch.
    """

    def __init__(self, net: nn.Module, recipe: TrainRecipe) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.leaves = leaf_names(net)
        self.router_temperature = 1.0
        self.straight_through = False
        self.classes: int | None = None

    def forward(self, inputs: Any, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss (scalar), and float counts (2 + K): samples, correct ones in hard routing, samples per leaf."""
        recipe = self.recipe
        options: dict[str, Any] = {
            "label_smoothing": recipe.label_smoothing,
            "teacher_logits": teacher_logits,
            "distillation_weight": recipe.distillation_weight,
            "distillation_temperature": recipe.distillation_temperature,
        }
        if not self.leaves:
            logits = check_logits(self.net(*as_arguments(inputs)))
            self._learn_classes(logits, targets)
            return dense_loss(logits, targets, **options), _counts(logits.detach(), targets)
        leaf_logits, log_p = self.net.forward_leaves(inputs)  # type: ignore[operator]
        self._learn_classes(leaf_logits, targets)
        log_p = temper(log_p, self.leaves, self.router_temperature)
        routed = hard_leaf(log_p, self.leaves)
        loss = soft_routing_loss(
            leaf_logits,
            log_p,
            targets,
            responsibility_weight=self.net.config.responsibility_weight,  # type: ignore[union-attr, arg-type]
            responsibility_temperature=self.net.config.responsibility_temperature,  # type: ignore[union-attr, arg-type]
            routed=routed if self.straight_through else None,
            **options,
        )
        if recipe.balance_weight:
            loss = loss + recipe.balance_weight * balance_loss(log_p, _mean_over_ranks(log_p.detach().exp()))
        chosen = leaf_logits.detach()[torch.arange(len(routed), device=routed.device), routed]
        return loss, torch.cat([_counts(chosen, targets), leaf_counts(routed, len(self.leaves))])

    def _learn_classes(self, logits: Tensor, targets: Tensor) -> None:
        """Checks the first batch against the network; later ones are checked before they leave the host."""
        if self.classes is None:
            check_targets(targets, logits.shape[-1])
            self.classes = logits.shape[-1]


def _mean_over_ranks(probabilities: Tensor) -> Tensor:
    """(K,) mean over the rows of all processes."""
    rows = probabilities.new_full((1,), float(len(probabilities)))
    sums = all_reduce_sum(torch.cat([probabilities.sum(0), rows]))
    return sums[:-1] / sums[-1]


def leaf_counts(routed: Tensor, leaves: int) -> Tensor:
    """(K,) samples per leaf, as floats."""
    return (routed.unsqueeze(1) == torch.arange(leaves, device=routed.device)).sum(0).float()


def _counts(logits: Tensor, targets: Tensor) -> Tensor:
    correct = (logits.argmax(1) == class_indices(targets)).sum().float()
    return torch.stack([torch.full_like(correct, float(logits.shape[0])), correct])
