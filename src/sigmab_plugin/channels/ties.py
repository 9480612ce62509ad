"""Weights that several layers hold: what slicing would untie is refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import ModelError
from .groups import ChannelGroup


def check_not_shared(segments: Sequence[nn.Module]) -> None:
    """Raise ModelError where one parameter belongs to two segments."""
    for (number, first), *others in _holders(segments):
        for other, name in others:
            if other != number:
                raise ModelError(
                    f"parameter {first!r} is tied to {name!r} across a cut: a branch would untie them. "
                    "Cut elsewhere, or untie the weights first."
                )


def check_not_tied(groups: Iterable[ChannelGroup], segments: Sequence[nn.Module]) -> None:
    """Raise ModelError where channels can be split of a weight that two layers of a segment hold."""
    tied = {holder: holders for holders in _holders(segments) if len(holders) > 1 for holder in holders}
    for group in groups:
        for member in group.members:
            if group.prunable and (member.segment, member.tensor) in tied:
                (_, first), (_, second), *_ = tied[member.segment, member.tensor]
                raise ModelError(
                    f"parameter {first!r} is tied to {second!r}, and the channels of {group.name!r} cannot be split "
                    "for one of them alone. Untie the weights first: give each layer a copy."
                )


def _holders(segments: Sequence[nn.Module]) -> list[list[tuple[int, str]]]:
    """For each parameter where it is held, (segment, name); a layer that a segment uses twice counts once."""
    found: dict[int, list[tuple[int, str]]] = {}
    for number, segment in enumerate(segments):
        for prefix, module in segment.named_modules():
            for name, parameter in module.named_parameters(prefix, recurse=False):
                found.setdefault(id(parameter), []).append((number, name))
    return list(found.values())
