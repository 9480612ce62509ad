"""Bytes that a network needs, in the form in which a technique stores it.

A tensor counts as what would be written: dense; packed, while it is as LegoNet made it (its share of the indices,
and the codebook once); or, with zeros, as one bit per value and the values that are not zero, where that is less.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
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
    for name, tensor in effective_tensors(network):
        if packed is not None and _still_packed(packed, name, tensor):
            entry = packed.tensors[name]
            sizes[name] = _bytes(entry.index) + (_bytes(entry.scale) if entry.scale is not None else 0)
            form, shared = "codebook", _bytes(packed.codebook)
            continue
        # Biases and statistics often hold zeros by chance; only weights are ever stored sparse.
        sizes[name] = _bytes(tensor) if tensor.dim() < 2 else min(_bytes(tensor), sparse_bytes(tensor))
        if sizes[name] < _bytes(tensor) and form == "dense":
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
    seen: set[Hashable] = set()
    for prefix, module in network.named_modules():
        if "parametrizations" in prefix.split("."):
            continue
        tensors: dict[str, Any] = {**module._parameters, **module._buffers}
        keys: dict[str, Hashable] = {name: id(tensor) for name, tensor in tensors.items()}
        if parametrize.is_parametrized(module):
            for name, chain in module.parametrizations.items():  # type: ignore[operator, union-attr]
                # The weight is made anew at every call: what it is made of tells whether it is tied.
                parts = tuple(id(part) for part in (*chain._parameters.values(), *chain._buffers.values()))
                keys[name] = parts[0] if len(parts) == 1 else parts
                tensors[name] = getattr(module, name)
        for name, tensor in tensors.items():
            if tensor is None or keys[name] in seen:
                continue
            seen.add(keys[name])
            yield f"{prefix}.{name}" if prefix else name, tensor.detach()


def _still_packed(packed: Any, name: str, tensor: torch.Tensor) -> bool:
    """Whether a weight is still what its codebook expands to: training after LegoNet makes it dense again."""
    if name not in packed.tensors:
        return False
    return torch.equal(
        tensor, packed.tensors[name].expand(packed.codebook, packed.config.block_size).to(tensor)
    )


def sparse_bytes(tensor: torch.Tensor) -> int:
    """One bit per value, and the values that are not zero."""
    return math.ceil(tensor.numel() / 8) + int(torch.count_nonzero(tensor)) * tensor.element_size()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
