"""The share of the dense parameters that one path has: widths that reach a target, a word where it is large."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch

from ..channels import slices_of
from ..counting import parameter_count
from ..errors import ConfigError
from .allocation import top_channels
from .plan import paths_at, prefixes

if TYPE_CHECKING:
    from .net import SigmaBNet
    from .prepare import Prepared

_log = logging.getLogger(__name__)

#: Share above which a path is called large.
_LARGE = 0.8


def path_parameters(prepared: Prepared, *, scale: float, leaf: str) -> int:
    """Parameters of one path, routers included, if default widths are multiplied by ``scale``."""
    previous, prepared.scale = prepared.scale, scale
    try:
        keep = {
            group.name: top_channels(
                -torch.arange(group.size).float(), prepared.width(group, branch), group.partitions
            )
            for number, branch in enumerate([*prefixes(leaf), leaf])
            for group in prepared.owned(number)
        }
    finally:
        prepared.scale = previous
    total = parameter_count(prepared.segments.backbone)
    for number, module in enumerate(prepared.segments.tail):
        slices = slices_of(prepared.groups, keep, segment=number, shapes=prepared.shapes[number + 1])
        for name, parameter in module.named_parameters():
            shape = list(parameter.shape)
            for dim, index in slices.get(name, {}).items():
                shape[dim] = len(index)
            total += math.prod(shape)
    return total + _router_parameters(prepared, keep)


def _router_parameters(prepared: Prepared, keep: dict[str, torch.Tensor]) -> int:
    dim = prepared.config.projection_dim
    total = 0
    for frontier in range(prepared.depth):
        width = prepared.features[frontier]
        for group in prepared.groups:
            if group.name in keep and frontier in group.frontiers:
                _, channels = group.frontiers[frontier].pairs(group.size)
                width -= int((~torch.isin(channels, keep[group.name])).sum())
        total += width * dim + dim + 2 * dim + 2 * dim + 2
    return total


def solve_scale(prepared: Prepared) -> float:
    """The largest factor on the default widths whose path has at most the asked share of parameters.

    Raises:
        ConfigError: no factor reaches ``active_ratio``; the message gives the reachable range.
    """
    ratio = prepared.config.active_ratio
    assert ratio is not None
    dense = parameter_count(prepared.segments.backbone, *prepared.segments.tail)
    leaf = paths_at(prepared.depth)[0]

    def active(scale: float) -> float:
        return path_parameters(prepared, scale=scale, leaf=leaf) / dense

    low, high = 0.0, math.sqrt(2**prepared.depth) + 1e-6
    smallest, largest = active(low), active(high)
    if not smallest <= ratio <= largest:
        raise ConfigError(
            f"active_ratio {ratio} cannot be reached: with these levels a path has between {smallest:.3f} and "
            f"{largest:.3f} of the dense parameters, of which the backbone has "
            f"{parameter_count(prepared.segments.backbone) / dense:.3f} and routers with a projection_dim of "
            f"{prepared.config.projection_dim} up to {_router_parameters(prepared, {}) / dense:.3f}. Cut earlier (a "
            "smaller backbone), lower projection_dim, or ask for another ratio."
        )
    for _ in range(40):
        middle = (low + high) / 2
        if active(middle) <= ratio:
            low = middle
        else:
            high = middle
    return low


def warn_if_large(prepared: Prepared, net: SigmaBNet) -> None:
    """A tree that reads nearly as much as the dense network, or more, is seldom what was wanted."""
    dense = parameter_count(prepared.segments.backbone, *prepared.segments.tail)
    counts = net.parameter_counts()
    if counts.active <= _LARGE * dense:
        return
    leaf = max(counts.per_path, key=counts.per_path.__getitem__)
    routers = parameter_count(*(m for name, m in net.path_modules(leaf) if name.startswith("routers.")))
    _log.warning(
        "one path has %.2f of the dense network's parameters (the backbone %.2f, its routers %.2f), and %d of %d "
        "groups of channels keep all channels (level INFO names them): cut earlier, lower projection_dim, or give "
        "an active_ratio",
        counts.active / dense,
        counts.backbone / dense,
        routers / dense,
        sum(bool(group.complete) for group in prepared.groups),
        len(prepared.groups),
    )
