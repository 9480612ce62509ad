"""Sparsity ranges: what global pruning does to each layer, observed and then held to the roles' limits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import MixAndMatchConfig
from .roles import LayerWeight
from .scores import Sensitivity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerRange:
    """A weight tensor's range of sparsities.

    Attributes:
        minimum: rho_min, limits applied.
        maximum: rho_max, limits applied.
        observed: sparsity of the layer in each run, by ``"criterion@global sparsity"``.
    """

    name: str
    module: str
    role: str
    parameters: int
    minimum: float
    maximum: float
    observed: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerRange:
        return cls(**values)


def observe_ranges(
    layers: Sequence[LayerWeight], sensitivity: Sensitivity, config: MixAndMatchConfig
) -> tuple[LayerRange, ...]:
    """Range of every layer: min and max of its sparsity over ``config.criteria`` x ``config.sparsities``.

    In each run one threshold is set for all layers together; among weights of equal importance the earlier ones go.
    Normalisation takes no part in it. A layer whose importance is 0 throughout (no gradient reached it) is left out of
    that criterion, with a warning.
    """
    pruned = [layer for layer in layers if layer.role != "normalization"]
    observed: dict[str, dict[str, float]] = {layer.name: {} for layer in layers}
    for criterion in config.criteria:
        importance = {layer.name: sensitivity.importance(criterion, layer.name).flatten() for layer in pruned}
        dead = [name for name, values in importance.items() if not values.any()]
        if dead:
            logger.warning("mix_and_match: %s is 0 for all weights of %s", criterion, ", ".join(dead))
        alive = {name: values for name, values in importance.items() if name not in dead}
        if not alive:
            continue
        order = torch.cat(list(alive.values())).argsort(stable=True)
        sizes = torch.tensor([len(values) for values in alive.values()])
        for sparsity in config.sparsities:
            dropped = order[: int(sparsity * len(order) + 1e-9)]
            layer_of = torch.bucketize(dropped, sizes.cumsum(0), right=True)
            shares = torch.bincount(layer_of, minlength=len(sizes)) / sizes.double()
            for name, share in zip(alive, shares.tolist(), strict=True):
                observed[name][f"{criterion}@{sparsity}"] = share
    return tuple(_limited(layer, observed[layer.name], config) for layer in layers)


def _limited(layer: LayerWeight, observed: dict[str, float], config: MixAndMatchConfig) -> LayerRange:
    """The role's limits win over the rule for small layers: Swin's patch embedding is small as well."""
    lower, upper = 0.0, config.maximum_sparsity
    if layer.role in config.role_limits:
        lower, largest = config.role_limits[layer.role]
        upper = min(upper, largest)
    elif layer.parameters < config.small_layer_parameters:
        upper = min(upper, config.small_layer_sparsity)
    least, most = min(observed.values(), default=0.0), max(observed.values(), default=0.0)
    return LayerRange(
        name=layer.name,
        module=layer.module,
        role=layer.role,
        parameters=layer.parameters,
        minimum=min(max(least, lower), upper),
        maximum=min(max(most, lower), upper),
        observed=observed,
    )
