"""Layouts of layers that only a customised Torch-Pruning pruner understands, found by trying it.

The layer's tensors are replaced by their own flat indices; after the pruner has dropped a set of
channels, the surviving numbers tell which positions were lost. Two calls per bit of the channel
number identify every position.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .layouts import Layout, Place


class Prober:
    """Finds layouts by calling customised pruners on coded copies of a layer."""

    def __init__(self, pruners: Mapping[type[nn.Module], Any]) -> None:
        self._pruners = dict(pruners)
        self._uses: list[tuple[int, str, str, str, list[tuple[int, int]]]] = []

    @property
    def used(self) -> bool:
        return bool(self._uses)

    def record(
        self, segment: int, layer: str, role: str, group: str, pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Remember that ``layer`` holds ``group``: pairs of (layer channel, group channel)."""
        self._uses.append((segment, layer, role, group, list(pairs)))

    def layout(self, layer: nn.Module) -> Layout | None:
        pruner = self._pruners.get(type(layer))
        if pruner is None:
            return None

        def places(module: nn.Module, role: str, idxs: Sequence[int]) -> list[Place]:
            return _restrict(_probe(module, pruner, role), idxs)

        same = getattr(type(pruner), "prune_out_channels", 0) is getattr(type(pruner), "prune_in_channels", 1)
        return Layout(places, lambda module: None, coupled=lambda module: same)

    def attributes(
        self, module: nn.Module, keep: Mapping[str, torch.Tensor], *, segment: int
    ) -> dict[str, dict[str, Any]]:
        """Attributes of ``module``'s customised layers after slicing: submodule -> {name: value}."""
        dropped: dict[str, dict[str, list[int]]] = {}
        for number, layer, role, group, pairs in self._uses:
            if number == segment and group in keep:
                kept = set(keep[group].tolist())
                gone = [p for p, c in pairs if c not in kept]
                dropped.setdefault(layer, {}).setdefault(role, []).extend(gone)
        result: dict[str, dict[str, Any]] = {}
        for layer, roles in dropped.items():
            changes = self._changes(module.get_submodule(layer), roles)
            for name, values in changes.items():
                result[".".join(part for part in (layer, name) if part)] = values
        return result

    def _changes(self, layer: nn.Module, dropped: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
        pruner = self._pruners[type(layer)]
        pruned = copy.deepcopy(layer)
        for role, idxs in dropped.items():
            if idxs:
                getattr(pruner, f"prune_{role}_channels")(pruned, sorted(set(idxs)))
        changed: dict[str, dict[str, Any]] = {}
        after = dict(pruned.named_modules())
        for name, before in layer.named_modules():
            for key, value in vars(before).items():
                new = vars(after[name]).get(key)
                if isinstance(value, (int, tuple)) and not isinstance(value, bool) and new != value:
                    changed.setdefault(name, {})[key] = list(new) if isinstance(new, tuple) else new
        return changed


def _channels(layer: nn.Module, pruner: Any, role: str) -> int:
    return int(getattr(pruner, f"get_{role}_channels")(layer))


def _restrict(places: Sequence[Place], idxs: Sequence[int]) -> list[Place]:
    wanted = set(idxs)
    result: list[Place] = []
    for tensor, dim, positions, channels in places:
        pairs = [(p, c) for p, c in zip(positions, channels, strict=True) if c in wanted]
        result.append((tensor, dim, [p for p, _ in pairs], [c for _, c in pairs]))
    return result


def _probe(layer: nn.Module, pruner: Any, role: str) -> list[Place]:
    total = _channels(layer, pruner, role)
    shapes = {name: tuple(t.shape) for name, t in _tensors(layer).items()}
    code: dict[tuple[str, int], list[int]] = {}
    touched: dict[tuple[str, int], list[bool]] = {}
    for name, shape in shapes.items():
        for dim, length in enumerate(shape):
            code[name, dim] = [0] * length
            touched[name, dim] = [False] * length
    for bit in range(max(1, (total - 1).bit_length())):
        for value in (0, 1):
            drop = [c for c in range(total) if (c >> bit) & 1 == value]
            if not drop or len(drop) == total:
                continue
            survivors = _survivors(layer, pruner, role, drop, shapes)
            for key, alive in survivors.items():
                for position, kept in enumerate(alive):
                    if not kept:
                        touched[key][position] = True
                        code[key][position] |= value << bit
    places: list[Place] = []
    for (name, dim), hit in touched.items():
        positions = [p for p, t in enumerate(hit) if t]
        if positions:
            places.append((name, dim, positions, [code[name, dim][p] for p in positions]))
    return places


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return dict(layer.named_parameters()) | dict(layer.named_buffers())


def _survivors(
    layer: nn.Module, pruner: Any, role: str, drop: list[int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, int], list[bool]]:
    coded = copy.deepcopy(layer).double()
    with torch.no_grad():
        for tensor in _tensors(coded).values():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    getattr(pruner, f"prune_{role}_channels")(coded, drop)
    result: dict[tuple[str, int], list[bool]] = {}
    for name, tensor in _tensors(coded).items():
        flat = tensor.detach().long().flatten()
        shape = shapes[name]
        for dim, length in enumerate(shape):
            stride = 1
            for later in shape[dim + 1 :]:
                stride *= later
            alive = torch.zeros(length, dtype=torch.bool)
            alive[(flat // stride) % length] = True
            result[name, dim] = alive.tolist()
    return result
