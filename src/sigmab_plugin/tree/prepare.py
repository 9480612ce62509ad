"""A dense model, cut and understood: segments, modalities, channel groups and widths."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..channels import ChannelGroup, Slices, slice_module, slices_of
from ..channels.probe import Prober
from ..channels.slicing import named_tensors
from ..channels.ties import check_not_shared, check_not_tied
from ..channels.torch_pruning import collect_groups
from ..config import SigmaBConfig
from ..errors import ConfigError, ModelError
from .allocation import check_widths, filter_norms, width_of
from .copying import check_copied
from .modality import Modality
from .reading import read_example
from .segments import Segments, chain, cut
from .trial import confirmed_groups
from .widths import solve_scale

_log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """A dense model, cut and understood, ready to be restructured or to give its static twin."""

    segments: Segments
    example: Any
    modalities: tuple[Modality, ...]
    features: tuple[int, ...]
    groups: tuple[ChannelGroup, ...]
    scores: dict[str, torch.Tensor]
    prober: Prober | None
    config: SigmaBConfig
    scale: float = 1.0
    shapes: tuple[dict[str, tuple[int, ...]], ...] = field(default=())

    @property
    def depth(self) -> int:
        return len(self.segments.levels)

    def owned(self, segment: int) -> list[ChannelGroup]:
        return [g for g in self.groups if g.owner == segment and g.prunable]

    def width(self, group: ChannelGroup, branch: str) -> int:
        return width_of(
            group,
            config=self.config,
            branch=branch,
            level=self.segments.names[group.owner],
            branches=2 ** min(group.owner + 1, self.depth),
            scale=self.scale,
        )

    def slices(self, number: int, keep: Mapping[str, torch.Tensor]) -> Slices:
        """What segment ``number`` of the tail keeps of its tensors."""
        return slices_of(self.groups, keep, segment=number, shapes=self.shapes[number + 1])

    def sliced(self, number: int, keep: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, Any]]:
        """Segment ``number`` of the tail with only the kept channels, and its special attributes."""
        module = self.segments.tail[number]
        slices = self.slices(number, keep)
        attributes = self.prober.attributes(module, keep, segment=number) if self.prober is not None else {}
        return slice_module(module, slices, attributes=attributes), attributes


def prepare(
    model: nn.Module | None,
    example_inputs: Any,
    *,
    config: SigmaBConfig,
    segments: Sequence[nn.Module] | None = None,
    importance: Callable[[Any], torch.Tensor | None] | None = None,
    ignored_layers: Sequence[Any] | None = None,
    customized_pruners: Mapping[type[nn.Module], Any] | None = None,
    unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
    root_module_types: Sequence[type] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    output_transform: Callable[[Any], Any] | None = None,
) -> Prepared:
    """Cut the model, read one example through it, and collect its channel groups.

    Raises:
        ConfigError: a level or head name cannot be used, or widths name nothing.
        ModelError: the model cannot be cut or traced.
    """
    if segments is not None:
        pieces = chain(segments)
    else:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"the model is a {type(model).__name__} and must be a torch.nn.Module: build it, and load a state dict "
                "into it with load_state_dict"
            )
        pieces = cut(model, levels=config.levels, head=config.head)
    pieces = dataclasses.replace(pieces, forward_fn=forward_fn)
    modules = [pieces.backbone, *pieces.tail]
    check_not_shared(modules)
    check_copied(modules)
    if isinstance(ignored_layers, (nn.Module, nn.Parameter)):
        ignored_layers = [ignored_layers]
    if model is not None:
        _check_ignored(model, [*modules], ignored_layers or ())
    reading = read_example(pieces, example_inputs, model=None if segments is not None else model)
    collected = collect_groups(
        pieces.tail,
        reading.frontier,
        channel_dim=reading.modalities[0].channel_dim,
        output_transform=output_transform,
        importance=importance,
        ignored_layers=ignored_layers,
        customized_pruners=customized_pruners,
        unwrapped_parameters=unwrapped_parameters,
        root_module_types=root_module_types,
    )
    check_not_tied(collected.groups, pieces.tail)
    shapes = tuple({name: tuple(t.shape) for name, t in named_tensors(m).items()} for m in modules)
    groups = confirmed_groups(
        collected.groups,
        pieces.tail,
        reading.frontier,
        kind=reading.modalities[0],
        shapes=shapes[1:],
        prober=collected.prober,
    )
    tensors = {(i, name): t for i, m in enumerate(pieces.tail) for name, t in named_tensors(m).items()}
    scores = {g.name: collected.scores.get(g.name, None) for g in groups if g.prunable}
    prepared = Prepared(
        segments=pieces,
        example=example_inputs,
        modalities=reading.modalities,
        features=reading.features,
        groups=groups,
        scores={
            g.name: score if (score := scores[g.name]) is not None else filter_norms(g, tensors)
            for g in groups
            if g.prunable
        },
        prober=collected.prober,
        config=config,
        shapes=shapes,
    )
    check_widths(config, groups, pieces.names)
    for number, name in enumerate(pieces.names[:-1]):
        if not prepared.owned(number):
            reasons = "; ".join(f"{g.name}: {g.complete}" for g in groups if g.owner in (-1, number))
            reasons = (
                reasons or "none of its layers is followed (detach or no_grad on the way, or no weights)"
            )
            raise ModelError(f"level {name!r} has no channels that can be split. {reasons}")
    for group in groups:
        produced = {m.segment for m in group.members if m.role == "out"}
        if group.complete and produced - {prepared.depth}:
            _log.info("%s keeps all %d channels: %s", group.name, group.size, group.complete)
    if config.active_ratio is not None:
        prepared.scale = solve_scale(prepared)
    return prepared


def _check_ignored(model: nn.Module, pieces: Sequence[nn.Module], ignored: Sequence[Any]) -> None:
    """Raises ConfigError for a module that is none of the model's: it would be ignored in silence."""
    known = {id(inner) for root in (model, *pieces) for inner in root.modules()}
    for layer in ignored:
        if isinstance(layer, nn.Module) and id(layer) not in known:
            raise ConfigError(
                f"ignored_layers holds a {type(layer).__name__} that is no module of this model; of a copy, perhaps?"
            )


def channel_means(group: ChannelGroup, means: torch.Tensor, frontier: int) -> torch.Tensor:
    """Mean activation of a group's channels from means over a frontier's positions, (2, C).

    A channel that holds several positions (a flattened feature map) gets their mean.
    """
    # The group may leave its segment only later on (a stream that crosses this cut unchanged).
    member = group.frontiers[frontier if frontier in group.frontiers else min(group.frontiers)]
    positions, channels = member.pairs(group.size)
    sums = means.new_zeros(means.shape[0], group.size)
    sums.index_add_(1, channels, means[:, positions])
    counts = torch.bincount(channels, minlength=group.size).clamp(min=1)
    return sums / counts
