"""Bytes that a network needs, in the form in which a technique stores it.

A tensor counts as what would be written: dense; packed, where LegoNet made it (its share of the indices,
and the codebook once); or, with zeros, as one bit per value and the values that are not zero, where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


@dataclass(frozen=True)
class Footprint:
    """Bytes of parameters and buffers.

    Attributes:
        active: read for one input; for a tree those of the largest path.
        stored: of the whole network.
        form: ``dense``, ``sparse`` or ``codebook``; what the smallest of the tensors are.
    """

    active: int
    stored: int
    form: str


def footprint(network: nn.Module) -> Footprint:
    """Active and stored bytes of ``network``."""
    packed = getattr(network, "legonet", None)
    sizes: dict[str, int] = {}
    form, shared = "dense", 0
    if packed is not None:
        form, shared = "codebook", _bytes(packed.codebook)
    for name, tensor in effective_tensors(network):
        if packed is not None and name in packed.tensors:
            entry = packed.tensors[name]
            sizes[name] = _bytes(entry.index) + (_bytes(entry.scale) if entry.scale is not None else 0)
            continue
        # Biases and statistics often hold zeros by chance; only weights are ever stored sparse.
        sizes[name] = _bytes(tensor) if tensor.dim() < 2 else min(_bytes(tensor), sparse_bytes(tensor))
        if sizes[name] < _bytes(tensor) and packed is None:
            form = "sparse"
    stored = sum(sizes.values()) + shared
    leaves = getattr(network, "leaves", None)
    if leaves is None:
        return Footprint(stored, stored, form)
    paths = []
    for leaf in leaves:
        on_path = tuple(f"{name}." for name, _ in network.path_modules(leaf))  # type: ignore[operator]
        paths.append(sum(size for name, size in sizes.items() if name.startswith(on_path)) + shared)
    return Footprint(max(paths), stored, form)


def effective_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, each once; a parametrized one as the layer sees it, without its parts."""
    seen: set[int] = set()
    for prefix, module in network.named_modules():
        if "parametrizations" in prefix.split("."):
            continue
        own: list[tuple[str, Any]] = [*module._parameters.items(), *module._buffers.items()]
        if parametrize.is_parametrized(module):
            own += [(name, getattr(module, name)) for name in module.parametrizations]  # type: ignore[union-attr]
        for name, tensor in own:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield f"{prefix}.{name}" if prefix else name, tensor.detach()


def sparse_bytes(tensor: torch.Tensor) -> int:
    """One bit per value, and the values that are not zero."""
    return math.ceil(tensor.numel() / 8) + int(torch.count_nonzero(tensor)) * tensor.element_size()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
