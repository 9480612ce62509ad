"""Channel groups from Torch-Pruning's DependencyGraph.

The tail of a network (its levels and its head) is traced on a copy that is thrown away, so that the
user's model keeps its mode, its gradients' flags and its hooks, and the autograd graph that the
DependencyGraph holds is freed. What remains is plain data.

Between segments the trace passes through :class:`~.anchors.ChannelAnchor`, a layer with one factor per channel.
It tells which positions of a frontier belong to which channels of a group, and it gives values
without a layer of their own (coordinates) the width that a concatenation needs to be indexed right.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from .anchors import Chain, ChannelAnchor, anchor_pruner, as_tuple
from .groups import ChannelGroup, Member
from .layouts import Layout, layout_of
from .probe import Prober
from .slicing import computed_tensors
from .tracing import RECURRENT, recurrent_pruners, traceable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectedGroups:
    """Groups of a tail, importance scores where an importance was given, and custom attributes.

    Attributes:
        scores: group name -> score per channel (higher is kept), for prunable groups.
        prober: recomputes attributes of layers that only a customised pruner understands.
    """

    groups: tuple[ChannelGroup, ...]
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    prober: Prober | None = None


def collect_groups(
    tail: Sequence[nn.Module],
    frontier: Any,
    *,
    channel_dim: Callable[[Any, int], int],
    output_transform: Callable[[Any], Any] | None = None,
    importance: Callable[[Any], torch.Tensor | None] | None = None,
    ignored_layers: Sequence[Any] | None = None,
    customized_pruners: Mapping[type[nn.Module], Any] | None = None,
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
    root_module_types: Sequence[type] | None = None,
) -> CollectedGroups:
    """Trace ``tail`` from ``frontier`` and return its channel groups.

    Args:
        tail: the level segments in order, then the head.
        frontier: values at the input of the first segment (tensor, or tuple of tensors).
        channel_dim: ``channel_dim(values, i)`` -> channel dimension of frontier value ``i``.
        importance: a Torch-Pruning importance, evaluated on every prunable group.
        ignored_layers, customized_pruners, unwrapped_parameters, root_module_types: as in
            Torch-Pruning's pruners; they name layers of the user's model.

    Raises:
        ModelError: the tail cannot be traced.
    """
    import torch_pruning as tp

    copied = _copy_sharing_weights(nn.ModuleList(tail))
    originals: dict[Any, Any] = dict(zip(_everything(nn.ModuleList(tail)), _everything(copied), strict=True))
    with traceable(copied), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        detached = tuple(v.detach() if torch.is_tensor(v) else v for v in as_tuple(frontier))
        chain = Chain(list(copied), detached, channel_dim, output_transform)
        pruners: dict[type[nn.Module], Any] = {ChannelAnchor: anchor_pruner(tp)}
        pruners.update(recurrent_pruners(tp, copied))
        pruners.update(customized_pruners or {})
        # Torch-Pruning's own keyword takes a list of pairs, whatever its annotation says.
        unwrapped = [(_counterpart(originals, p), dim) for p, dim in (unwrapped_parameters or [])]
        ignored = _inside(originals, ignored_layers or [])
        graph = tp.DependencyGraph()
        try:
            graph.build_dependency(
                chain,
                detached,
                forward_fn=lambda model, inputs: model(*inputs),
                unwrapped_parameters=unwrapped or None,
                customized_pruners=pruners,
                ignored_params=[p for p in ignored if isinstance(p, nn.Parameter)],
            )
            roots = tuple(root_module_types or (nn.modules.conv._ConvNd, nn.Linear))
            roots += tuple(kind for kind in (customized_pruners or {}) if isinstance(kind, type))
            raw_groups = list(graph.get_all_groups(ignored_layers=[], root_module_types=list(roots)))
        except Exception as error:
            raise ModelError(
                f"Torch-Pruning cannot trace the levels of this model: {error}. Give the layers that it cannot "
                "follow as ignored_layers or customized_pruners, or cut the model elsewhere."
            ) from error
        reader = _Reader(graph, chain, ignored, Prober(dict(customized_pruners or {})))
        groups, scores = reader.read(raw_groups, importance)
    return CollectedGroups(groups, scores, reader.prober if reader.prober.used else None)


def _copy_sharing_weights(modules: nn.ModuleList) -> nn.ModuleList:
    """A copy to hang hooks and anchors on; weights and gradients are only read, so they are not copied."""
    memo: dict[int, Any] = computed_tensors(modules)
    for parameter in modules.parameters():
        shared = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        shared.grad = parameter.grad
        memo[id(parameter)] = shared
    return copy.deepcopy(modules, memo)


class _Reader:
    """Turns Torch-Pruning's groups of one graph into plain data."""

    def __init__(self, graph: Any, chain: Chain, ignored: Sequence[Any], prober: Prober) -> None:
        self.graph, self.chain, self.prober = graph, chain, prober
        self.names: dict[Any, tuple[int, str]] = {}
        self.parameters: dict[int, tuple[int, str]] = {}
        for number, segment in enumerate(chain.segments.children()):
            for name, module in segment.named_modules():
                self.names.setdefault(module, (number, name))
            for name, parameter in segment.named_parameters():
                self.parameters.setdefault(id(parameter), (number, name))
        self.anchors = {
            anchor: (number, position)
            for number, anchors in enumerate(chain.anchors.children())
            for position, anchor in enumerate(anchors.get_submodule("items").children())
        }
        self.ignored = {inner for m in ignored if isinstance(m, nn.Module) for inner in m.modules()}
        self.order = {key: i for i, key in enumerate(self.names.values())}

    def read(
        self, raw_groups: Sequence[Any], importance: Callable[[Any], torch.Tensor | None] | None
    ) -> tuple[tuple[ChannelGroup, ...], dict[str, torch.Tensor]]:
        groups: dict[str, ChannelGroup] = {}
        scores: dict[str, torch.Tensor] = {}
        for raw in raw_groups:
            group = self._group(raw)
            if group is None:
                continue
            groups[group.name] = group
            if importance is not None and group.prunable:
                scores[group.name] = _score(importance, raw, group)
        ordered = sorted(groups.values(), key=lambda g: self.order.get(self._key(g), 0))
        return tuple(_without_conflicts(ordered)), scores

    def _key(self, group: ChannelGroup) -> tuple[int, str]:
        segment = next((m.segment for m in group.members if m.role == "out"), 0)
        return segment, group.name

    def _group(self, raw: Any) -> ChannelGroup | None:
        root = raw[0].dep.target.module
        size = len(set(raw[0].root_idxs))
        members: dict[tuple[Any, ...], Member] = {}
        frontiers: dict[int, Member] = {}
        partitions = 1
        reasons: list[str] = []
        producers: list[tuple[int, str]] = []
        probed: list[tuple[int, str, str, list[tuple[int, int]]]] = []
        last = len(self.chain.segments)
        for item in raw:
            module, handler = item.dep.target.module, item.dep.handler
            if type(module).__module__.startswith("torch_pruning"):
                continue
            role = "out" if self.graph.is_out_channel_pruning_fn(handler) else "in"
            pairs = sorted(dict.fromkeys(zip(item.idxs, item.root_idxs, strict=True)))
            if not pairs:
                continue
            if module in self.anchors:
                number, position = self.anchors[module]
                if pairs[-1][0] >= module.channels:
                    reasons.append(f"channel {pairs[-1][0]} does not exist at the input of segment {number}")
                    continue
                if number == 0:
                    reasons.append("its channels come from the backbone")
                elif number == last:
                    reasons.append("its channels are the outputs of the model")
                elif position == 0:
                    frontiers[number] = _member(number, "frontier", module.scale.ndim, "in", pairs, size)
                else:
                    reasons.append("its channels cross a cut as a side value")
                continue
            if isinstance(module, nn.Parameter):
                where = self.parameters.get(id(module))
                if where is None:
                    continue
                number, name = where
                dim = item.dep.target.pruning_dim % module.ndim
                if pairs[-1][0] >= module.shape[dim]:
                    reasons.append(f"parameter {name} has no index {pairs[-1][0]} along dim {dim}")
                    continue
                members[(number, name, dim)] = _member(number, name, dim, role, pairs, size)
                continue
            if module not in self.names:
                continue
            number, name = self.names[module]
            if role == "out" and module in self.ignored:
                reasons.append(f"{name} is an ignored layer")
            if isinstance(module, RECURRENT):
                reasons.append(f"{name} is recurrent")
                continue
            layout = self.prober.layout(module)
            if layout is not None:
                probed.append((number, name, role, pairs))
            layout = layout or layout_of(module)
            if layout is None:
                raise ModelError(
                    f"no channel layout for {name!r} ({type(module).__name__}): register one with "
                    "sigmab_plugin.channels.register_layout, or list the layer in ignored_layers"
                )
            problem = _add_places(members, module, layout, number, name, role, pairs, size)
            if problem:
                reasons.append(problem)
            blocks = layout.partitions(module, role)
            if blocks > 1:
                identity = [p for p, _ in pairs] == [c for _, c in pairs] == list(range(size))
                if identity and size % blocks == 0:
                    partitions = math.lcm(partitions, blocks)
                else:
                    reasons.append(f"{name} has {blocks} blocks, of which the group holds a part")
            if role == "out" and not layout.coupled(module):
                producers.append((number, name))
        if not members and not reasons:
            return None
        number, name = min(producers, key=lambda key: self.order[key]) if producers else self.names[root]
        for segment, layer, role, pairs in probed:
            self.prober.record(segment, layer, role, name, pairs)
        owner = -1 if any(r.startswith("its channels come from") for r in reasons) else number
        if partitions > 1 and size // math.gcd(size, partitions) == 1:
            reasons.append("every block has one channel")
        return ChannelGroup(
            name=name,
            size=size,
            owner=owner,
            members=tuple(members.values()),
            frontiers=frontiers,
            partitions=partitions,
            complete="; ".join(dict.fromkeys(reasons)),
        )


def _member(
    segment: int, tensor: str, dim: int, role: str, pairs: Sequence[tuple[int, int]], size: int
) -> Member:
    positions = tuple(int(p) for p, _ in pairs)
    channels = tuple(int(c) for _, c in pairs)
    identity = tuple(range(size))
    return Member(
        segment,
        tensor,
        dim,
        role,
        positions=None if positions == identity else positions,
        channels=None if channels == identity else channels,
    )


def _add_places(
    members: dict[tuple[Any, ...], Member],
    module: nn.Module,
    layout: Layout,
    number: int,
    name: str,
    role: str,
    pairs: Sequence[tuple[int, int]],
    size: int,
) -> str:
    """Add the layer's tensors to ``members``; returns what is inconsistent, or an empty string."""
    to_root = dict(pairs)
    if len(to_root) != len(pairs):
        return f"{name} reads one channel as several"
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for tensor, dim, positions, channels in layout.places(module, role, [p for p, _ in pairs]):
        if tensor not in tensors:
            return (
                f"{name}: its {tensor} is computed from others (weight norm, a parametrization, a mask): make it plain "
                "first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove)"
            )
        if len(positions) and max(positions) >= tensors[tensor].shape[dim]:
            return f"{name} has no channel {max(positions)}"
        full = f"{name}.{tensor}" if name else tensor
        mapped = sorted(dict.fromkeys((p, to_root[c]) for p, c in zip(positions, channels, strict=True)))
        # A coupled layer is listed once for its inputs and once for its outputs.
        members.setdefault((number, full, dim), _member(number, full, dim, role, mapped, size))
    return ""


def _score(importance: Callable[[Any], torch.Tensor | None], raw: Any, group: ChannelGroup) -> torch.Tensor:
    """The importance of a group's channels, (size,)."""
    kind = getattr(importance, "__name__", type(importance).__name__)
    try:
        score = importance(raw)
    except Exception as error:
        raise ConfigError(
            f"importance {kind} fails on the channels of {group.name!r}: {type(error).__name__}: {error}. One that "
            "reads gradients needs a backward pass through the model first"
        ) from error
    if score is None:
        raise ConfigError(
            f"the importance gives no score for the channels of {group.name!r} (it knows none of its "
            "layers); use another importance, or list the layer in ignored_layers"
        )
    if not torch.is_tensor(score) or score.ndim != 1 or len(score) != group.size:
        given = f"of shape {tuple(score.shape)}" if torch.is_tensor(score) else f"as {type(score).__name__}"
        raise ConfigError(
            f"importance {kind} gives scores {given} for the {group.size} channels of {group.name!r}; it must give "
            f"a tensor of shape ({group.size},)"
        )
    return score.detach().float().cpu()


def _without_conflicts(groups: Sequence[ChannelGroup]) -> Iterator[ChannelGroup]:
    """Two groups that claim one position of one tensor must both stay complete."""
    claims: dict[tuple[int, str, int], list[tuple[ChannelGroup, set[int]]]] = {}
    clashing: set[str] = set()
    for group in groups:
        for member in group.members:
            positions = set(member.pairs(group.size)[0].tolist())
            others = claims.setdefault((member.segment, member.tensor, member.dim), [])
            for other, taken in others:
                if other.name != group.name and taken & positions:
                    clashing.update((group.name, other.name))
            others.append((group, positions))
    for group in groups:
        if group.name in clashing and not group.complete:
            _log.info("channels of %s stay complete: two groups claim them", group.name)
            yield ChannelGroup(**{**vars(group), "complete": "two groups claim its channels"})
        else:
            yield group


def _everything(module: nn.Module) -> list[Any]:
    return [*module.modules(), *module.parameters()]


def _counterpart(originals: Mapping[Any, Any], thing: Any) -> Any:
    if thing not in originals:
        raise ConfigError(
            f"{type(thing).__name__} of shape {getattr(thing, 'shape', '?')} is not part of the levels"
        )
    return originals[thing]


def _inside(originals: Mapping[Any, Any], layers: Sequence[Any]) -> list[Any]:
    """Counterparts of ignored layers and of everything in them, as Torch-Pruning expands containers."""
    found: list[Any] = []
    outside: list[str] = []
    for layer in [layers] if isinstance(layers, str) else layers:
        if not isinstance(layer, (nn.Module, nn.Parameter)):
            raise ConfigError(
                f"ignored_layers takes modules and parameters of the model, not {layer!r} "
                f"({type(layer).__name__}); a name becomes a module by model.get_submodule(name)"
            )
        parts = layer.modules() if isinstance(layer, nn.Module) else (layer,)
        inside = [originals[part] for part in parts if part in originals]
        found += inside
        if not inside:
            outside.append(type(layer).__name__)
    if outside:
        _log.info(
            "ignored_layers: %s lie outside the levels and the head, where nothing is cut", ", ".join(outside)
        )
    return found
