"""Depth pruning inside a SigmaB tree: every leaf ends earlier, in an auxiliary head of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...counting import as_arguments
from ...errors import ModelError
from ...tree.plan import ShortenedLeaves, module_key, prefixes
from ..supervised import training_loss
from .config import DepthPruningConfig
from .cuts import kept_part, trace
from .network import AuxiliaryHead, class_count
from .training import Loss, run_stages


def is_tree(model: nn.Module) -> bool:
    """Whether ``model`` is a SigmaB net."""
    from ...tree.net import SigmaBNet

    return isinstance(model, SigmaBNet)


def prune_leaves(
    net: Any, example_inputs: Any, *, cut: str = "", head_widths: Sequence[int] = (32, 16), seed: int = 0
) -> Any:
    """Shorten the last specializer of every leaf and give the leaf an untrained auxiliary head.

    Backbone, routers and the other specializers stay as they are, so the routing stays the same. The plan
    records it: ``save`` and ``load`` treat the result like any tree.

    Args:
        net: a SigmaB net whose frontiers are 2-D feature maps; left as it was.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted.
        cut: last layer that is kept of the last specializers, by its name inside them; ``""`` drops
            them, and the heads read what the level above gives.

    Raises:
        ModelError: the frontiers are not 2-D feature maps, the net gives no logits (B, C), or the leaves are
            shortened already.
        ConfigError: no such cut (the message lists those there are).
    """
    if net.plan.shortened is not None:
        raise ModelError(
            "depth_pruning: the leaves are shortened already; shorten the tree that they came from"
        )
    pruned = copy.deepcopy(net).eval()
    arguments = as_arguments(example_inputs)
    frontiers: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        classes = class_count(pruned(*arguments).shape)
        backbone = pruned.backbone(*arguments)
        for leaf in pruned.leaves:
            frontier = backbone
            for path in prefixes(leaf)[:-1]:
                frontier = pruned.specializers[module_key(path)](frontier)
            if not isinstance(frontier, torch.Tensor) or frontier.dim() != 4:
                raise _no_map(leaf, frontier)
            frontiers[leaf] = (1, *frontier.shape[1:])
    shortened = ShortenedLeaves(cut, tuple(head_widths), classes, frontiers)
    shorten(pruned, shortened, seed=seed)
    pruned.plan = replace(net.plan, shortened=shortened)
    return pruned


def shorten(net: Any, shortened: ShortenedLeaves, *, seed: int = 0) -> None:
    """Shorten the leaves of ``net`` in place, with fresh heads. Nothing of the net runs but its last specializers.

    Raises:
        ModelError: a specializer does not give a 2-D feature map.
        ConfigError: no such cut.
    """
    reference = next(parameter for parameter in net.parameters() if parameter.is_floating_point())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for leaf, shape in shortened.frontiers.items():
            key = module_key(leaf)
            frontier = torch.zeros(shape, device=reference.device, dtype=reference.dtype)
            specializer: nn.Module = nn.Identity()
            if shortened.cut:
                traced = trace(net.specializers[key], (frontier,))
                specializer = kept_part(net.specializers[key], traced, traced.find(shortened.cut))
                frontier = specializer(frontier)
                if not isinstance(frontier, torch.Tensor) or frontier.dim() != 4:
                    raise _no_map(leaf, frontier)
            net.specializers[key] = specializer
            head = AuxiliaryHead(frontier.shape[1], shortened.classes, widths=shortened.head_widths)
            net.heads[key] = head.to(device=frontier.device, dtype=frontier.dtype).eval()


def train_leaf_heads(
    net: Any, train_data: Iterable[Any], config: DepthPruningConfig, *, loss_fn: Loss | None = None
) -> list[float]:
    """Train the auxiliary heads in place; eval mode afterwards.

    With ``config.freeze`` everything else stays, routers included. ``loss_fn(logits, targets)`` is given the logits
    of soft routing; without it the loss is the tree's own (eq. 8). Returns the mean loss of every epoch.
    """
    routing, net.routing = net.routing, "soft"
    flags = {parameter: parameter.requires_grad for parameter in net.parameters()}
    if config.freeze:
        net.requires_grad_(False)
        net.heads.requires_grad_(True)

    def training_mode() -> None:
        net.train()
        if config.freeze:
            net.eval()
            net.heads.train()

    def loss(inputs: tuple[Any, ...], targets: Any) -> torch.Tensor:
        return training_loss(net, inputs if len(inputs) > 1 else inputs[0], targets, loss_fn)

    try:
        return run_stages(net, train_data, config, loss=loss, training_mode=training_mode)
    finally:
        net.routing = routing
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _no_map(leaf: str, frontier: Any) -> ModelError:
    found = (
        f"a tensor {tuple(frontier.shape)}" if isinstance(frontier, torch.Tensor) else type(frontier).__name__
    )
    return ModelError(
        f"depth_pruning: leaf {leaf!r} would read {found}; the auxiliary head needs a 2-D feature map (B, C, H, W)"
    )
