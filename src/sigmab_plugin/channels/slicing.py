"""Cut a module down to some of its channels, without touching the original."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .groups import Slices
from .layouts import refresh_attributes


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by qualified name."""
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def slice_module(
    module: nn.Module,
    slices: Slices,
    *,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A copy of ``module`` in which each tensor keeps the indices that ``slices`` names.

    Every tensor is sliced once; full tensors are never copied. With empty ``slices`` the result is
    an independent copy. Works on the meta device.

    Args:
        slices: tensor name -> {dim: kept indices, ascending}.
        attributes: submodule name -> attributes to set, for layers that no layout describes.
        dtype: floating-point tensors are converted to it.
    """
    memo: dict[int, Any] = computed_tensors(module)
    touched: set[str] = set()
    for name, tensor in named_tensors(module).items():
        if name not in slices and dtype is None:
            continue
        kept = tensor.detach()
        for dim, index in slices.get(name, {}).items():
            kept = kept.index_select(dim, index.to(kept.device))
        if dtype is not None:
            kept = kept.to(dtype) if kept.is_floating_point() else kept.clone()
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = kept
        if name in slices:
            touched.update(_prefixes(name))
    result = copy.deepcopy(module, memo)
    # Outer modules first would read stale inner attributes: refresh the innermost first.
    for name, submodule in reversed(list(result.named_modules())):
        if name in touched:
            refresh_attributes(submodule)
    for name, values in (attributes or {}).items():
        target = result.get_submodule(name)
        for key, value in values.items():
            # JSON knows no tuples.
            setattr(target, key, tuple(value) if isinstance(getattr(target, key), tuple) else value)
    return result


def computed_tensors(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy with copies of what layers computed from their weights (weight norm, masks): it would refuse
    those that carry a gradient's graph.
    """
    return {
        id(value): value.detach().clone()
        for submodule in module.modules()
        for value in vars(submodule).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]
