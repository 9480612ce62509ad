"""Per-layer sparsities as the arguments of a structured pruner (Torch-Pruning's ``pruning_ratio_dict``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .ranges import LayerRange
from .roles import LayerWeight

#: Roles whose outputs keep their width: attention reshapes them to heads of a size that its forward has fixed.
_WHOLE = ("router", "attention")


@dataclass(frozen=True)
class StructuredRatios:
    """Arguments for ``torch_pruning.pruner.BasePruner``.

    Attributes:
        pruning_ratio_dict: share of output channels to remove, by module of the model to be pruned.
        ignored_layers: modules whose outputs must stay: the classifier's last layers (the classes), routers, the
            projections of attention.
    """

    pruning_ratio_dict: dict[nn.Module, float]
    ignored_layers: list[nn.Module]


def structured_ratios(
    model: nn.Module,
    layers: Sequence[LayerRange] | Sequence[LayerWeight],
    sparsities: Mapping[str, float],
    *,
    classes: int | None = None,
    match: str = "channels",
) -> StructuredRatios:
    """Hand one strategy's sparsities to a structured pruner.

    A sparsity rho becomes the ratio of removed channels with ``match="channels"``. Removing channels
    narrows the next layer as well, so about 1 - (1 - rho)^2 of the parameters go; ``match="parameters"``
    gives the ratio 1 - sqrt(1 - rho), at which about rho of them go.

    Args:
        model: the very object that will be pruned; keys are its modules.
        layers: ranges, or what ``find_layers`` found.
        sparsities: from :func:`~sigmab_plugin.techniques.mix_and_match.layer_sparsities`.
        classes: width of the logits; classifier layers of that width are ignored. By default every
            classifier layer is.
    """
    ratios: dict[nn.Module, float] = {}
    ignored: list[nn.Module] = []
    for layer in layers:
        module = model.get_submodule(layer.module)
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        width = _width(module)
        if _stays_whole(layer.role, width, classes):
            ignored.append(module)
            continue
        sparsity = sparsities[layer.name]
        ratio = sparsity if match == "channels" else 1 - math.sqrt(1 - sparsity)
        # One channel stays: Torch-Pruning silently leaves a layer whole that would lose them all.
        ratios[module] = max(0.0, min(ratio, 1 - 1 / max(width, 1) - 1e-9))
    return StructuredRatios(ratios, ignored)


def whole_layers(model: nn.Module, layers: Sequence[LayerWeight], classes: int) -> list[nn.Module]:
    """Modules of ``model`` whose outputs must stay: what :class:`StructuredRatios` ignores, without ratios."""
    modules = [(layer.role, model.get_submodule(layer.module)) for layer in layers]
    return [
        module
        for role, module in modules
        if isinstance(module, (_ConvNd, nn.Linear)) and _stays_whole(role, _width(module), classes)
    ]


def _width(module: _ConvNd | nn.Linear) -> int:
    return module.out_channels if isinstance(module, _ConvNd) else module.out_features


def _stays_whole(role: str, width: int, classes: int | None) -> bool:
    return role in _WHOLE or (role == "classifier" and classes in (None, width))
