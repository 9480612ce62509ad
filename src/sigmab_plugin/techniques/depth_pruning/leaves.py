"""Depth pruning inside a SigmaB tree: every leaf ends earlier, in an auxiliary head of its own."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...counting import as_arguments
from ...errors import FormatError, ModelError
from .config import DepthPruningConfig
from .cuts import kept_part, trace
from .network import AuxiliaryHead
from .training import run_stages

LEAVES = "leaves.json"
FORMAT, VERSION = "sigmab_plugin.depth_pruning.leaves", 1


def is_tree(model: nn.Module) -> bool:
    """Whether ``model`` is a SigmaB net."""
    from ...tree.net import SigmaBNet

    return isinstance(model, SigmaBNet)


def prune_leaves(
    net: Any, example_inputs: Any, *, cut: str = "", head_widths: Sequence[int] = (32, 16), seed: int = 0
) -> Any:
    """Shorten the last specializer of every leaf and give the leaf an untrained auxiliary head.

    Backbone, routers and the other specializers stay as they are, so the routing stays the same.

    Args:
        net: a SigmaB net whose frontiers are 2-D feature maps; left as it was.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted.
        cut: last layer that is kept of the last specializers, by its name inside them; ``""`` drops
            them, and the heads read what the level above gives.

    Raises:
        ModelError: the frontiers are not 2-D feature maps.
        ConfigError: no such cut (the message lists those there are).
    """
    pruned = copy.deepcopy(net).eval()
    arguments = as_arguments(example_inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes = pruned(*arguments).shape[-1]
        backbone = pruned.backbone(*arguments)
        for leaf in pruned.leaves:
            steps = leaf.split("/")
            keys = ["_".join(steps[: depth + 1]) for depth in range(len(steps))]
            frontier = backbone
            for key in keys[:-1]:
                frontier = pruned.specializers[key](frontier)
            specializer: nn.Module = nn.Identity()
            if cut:
                traced = trace(pruned.specializers[keys[-1]], (frontier,))
                specializer = kept_part(pruned.specializers[keys[-1]], traced, traced.find(cut))
                frontier = specializer(frontier)
            if not isinstance(frontier, torch.Tensor) or frontier.dim() != 4:
                raise ModelError(
                    f"depth_pruning: leaf {leaf!r} would read {_describe(frontier)}; the auxiliary head needs a "
                    "2-D feature map (B, C, H, W)"
                )
            pruned.specializers[keys[-1]] = specializer
            head = AuxiliaryHead(frontier.shape[1], classes, widths=head_widths)
            pruned.heads[keys[-1]] = head.to(device=frontier.device, dtype=frontier.dtype).eval()
    pruned.depth_pruning = {"cut": cut, "head_widths": list(head_widths)}
    return pruned


def save_pruned_leaves(net: Any, directory: str | os.PathLike[str]) -> Path:
    """Write a tree with auxiliary heads: ``plan.json`` and ``model.safetensors`` as every tree, and ``leaves.json``."""
    from ...tree import save

    target = save(net, directory)
    record = {"format": FORMAT, "version": VERSION, **net.depth_pruning}
    (target / LEAVES).write_text(json.dumps(record, indent=1) + "\n")
    return target


def load_pruned_leaves(directory: str | os.PathLike[str], dense_model: nn.Module, example_inputs: Any) -> Any:
    """Rebuild what :func:`save_pruned_leaves` wrote; bitwise the weights that were saved.

    Args:
        dense_model: a model of the dense architecture.
        example_inputs: one batch, as for :func:`prune_leaves`.

    Raises:
        FormatError: a file is missing, truncated, altered, or from a newer version.
        ModelError: ``dense_model`` is not the architecture that was restructured.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ...tree.io import WEIGHTS, assemble, read_plan

    folder = Path(directory)
    plan = read_plan(folder)
    try:
        record = json.loads((folder / LEAVES).read_text())
        known = record["format"] == FORMAT and record["version"] == VERSION
        cut, widths = record["cut"], record["head_widths"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{folder / LEAVES} cannot be read: {error}; sigmab_plugin.load reads other trees"
        ) from error
    if not known:
        raise FormatError(
            f"{folder / LEAVES} has version {record['version']!r}; this package reads {VERSION}"
        )
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{folder / WEIGHTS} is missing or truncated: {error}") from error
    net = prune_leaves(assemble(plan, dense_model), example_inputs, cut=cut, head_widths=widths)
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise FormatError(f"{folder / WEIGHTS} does not fit its plan: {error}") from error
    return net.eval()


def train_leaf_heads(net: Any, train_data: Iterable[Any], config: DepthPruningConfig) -> list[float]:
    """Train the auxiliary heads with the tree's own loss (eq. 8); in place, eval mode afterwards.

    With ``config.freeze`` everything else stays, routers included. Returns the mean loss of every epoch.
    """
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
        value: torch.Tensor = net.loss(inputs if len(inputs) > 1 else inputs[0], targets)
        return value

    try:
        return run_stages(net, train_data, config, loss=loss, training_mode=training_mode)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _describe(frontier: Any) -> str:
    return (
        f"a tensor {tuple(frontier.shape)}" if isinstance(frontier, torch.Tensor) else type(frontier).__name__
    )
