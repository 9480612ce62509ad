"""Torch-Pruning's own pruners as a config section, so that they stand in lists of techniques like ours do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch_pruning as tp
from torch import nn

from ..config import TechniqueConfig, option
from ..counting import as_arguments
from ..errors import ConfigError, ModelError
from ..techniques.base import Context, Technique
from ..techniques.mix_and_match.roles import class_count, find_layers
from ..techniques.mix_and_match.structured import whole_layers
from ..tuning.seeding import preserve_random_state
from .torch_pruning_outputs import check_logits, logits_before, require_gradients

#: Importance in a section -> Torch-Pruning's class.
IMPORTANCES = {
    "magnitude": "MagnitudeImportance",
    "lamp": "LAMPImportance",
    "random": "RandomImportance",
    "bn_scale": "BNScaleImportance",
}


@dataclass(frozen=True)
class TorchPruningConfig(TechniqueConfig):
    """Structural pruning in one step by Torch-Pruning's base pruner."""

    algorithm: ClassVar[str] = "torch_pruning"

    pruning_ratio: float = option(0.5, "share of channels to remove", minimum=0.0, exclusiveMaximum=1.0)
    pruning_ratios: dict[str, float] = option({}, "other shares by module name")
    importance: str = option(
        "magnitude", "how channels are ranked", enum=("magnitude", "lamp", "random", "bn_scale")
    )
    global_pruning: bool = option(False, "rank the channels of all layers together")
    round_to: int | None = option(None, "round widths to a multiple of it", minimum=1)
    ignored_layers: tuple[str, ...] = option(
        (),
        "modules to leave alone; the classifier always is, and attention that pruning_ratios does not name",
    )


def apply(model: nn.Module, config: TorchPruningConfig, context: Context) -> nn.Module:
    """A pruned copy of ``model``, in eval mode. A SigmaB net is traced with all its leaves.

    Raises:
        ConfigError: no example inputs, or a module name that does not exist.
        ModelError: nothing was pruned although something was asked for, no logits in the output, or a pruned network
            that does not run or has lost classes.
    """
    if context.example_inputs is None:
        raise ConfigError(
            "torch_pruning: example_inputs is missing; give one batch, the graph is traced with it"
        )
    pruned = copy.deepcopy(model).eval()
    inputs = as_arguments(context.example_inputs)
    logits = logits_before(pruned, inputs, algorithm="torch_pruning")
    classes = class_count(logits)
    ratios = {_module(pruned, name): ratio for name, ratio in config.pruning_ratios.items()}
    whole = whole_layers(pruned, find_layers(pruned, context.example_inputs), classes)
    flags = {name: parameter.requires_grad for name, parameter in pruned.named_parameters()}
    require_gradients(pruned)
    # Hard routing would trace one path alone.
    routing = getattr(pruned, "routing", None)
    if routing is not None:
        pruned.routing = "soft"  # type: ignore[assignment]
    before = sum(parameter.numel() for parameter in pruned.parameters())
    base: Any = getattr(tp.pruner, "BasePruner", None) or tp.pruner.MetaPruner
    # Fresh containers: the defaults of Torch-Pruning's signature are shared between pruners.
    pruner = base(
        pruned,
        inputs,
        getattr(tp.importance, IMPORTANCES[config.importance])(),
        pruning_ratio=config.pruning_ratio,
        pruning_ratio_dict=ratios,
        global_pruning=config.global_pruning,
        round_to=config.round_to,
        ignored_layers=[
            *_classifiers(pruned, classes),
            *(module for module in whole if module not in ratios),
            *(_module(pruned, name) for name in config.ignored_layers),
        ],
        in_channel_groups={},
        out_channel_groups={},
    )
    with preserve_random_state():
        torch.manual_seed(context.seed)
        pruner.step()
    after = sum(parameter.numel() for parameter in pruned.parameters())
    if after == before and (config.pruning_ratio > 0 or config.pruning_ratios):
        raise ModelError(
            "torch_pruning: nothing was pruned; Torch-Pruning found no prunable channels in "
            f"{type(model).__name__}. Name other layers, or a larger pruning_ratio."
        )
    check_logits(pruned, inputs, logits.shape, algorithm="torch_pruning")
    for name, parameter in pruned.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
        parameter.grad = None
    if routing is not None:
        pruned.routing = routing
    return pruned.eval()


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ConfigError(f"torch_pruning: the model has no module {name!r}") from error


def _classifiers(model: nn.Module, classes: int) -> list[nn.Module]:
    """Linear layers as wide as the output: the classifier, or a tree's classifiers."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == classes
    ]


technique = Technique(TorchPruningConfig, apply)
