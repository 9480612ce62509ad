"""Which kind of data crosses a cut: what its layers do with it says more than its shape."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .modality import ChannelsLast, Images, Modality, Points, Tokens, Vectors, features, is_point_cloud

_log = logging.getLogger(__name__)

_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)


class Witnesses:
    """While a segment runs: the shapes that its layers read and write, and where these have their channels."""

    def __init__(self, segment: nn.Module) -> None:
        self._segment = segment
        self._handles: list[RemovableHandle] = []
        self._read: list[tuple[torch.Size, bool]] = []
        self._written: list[tuple[torch.Size, bool]] = []

    def __enter__(self) -> Witnesses:
        for module in self._segment.modules():
            if isinstance(module, (*_CHANNELS_FIRST, *_CHANNELS_LAST)):
                self._handles.append(module.register_forward_hook(self._note))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return  # over channels and positions alike
        last = isinstance(module, _CHANNELS_LAST)
        written = output[0] if isinstance(output, tuple) and output else output
        for value, seen in ((inputs[0] if inputs else None, self._read), (written, self._written)):
            if torch.is_tensor(value):
                seen.append((value.shape, last))

    def first_reader(self, shape: torch.Size) -> bool | None:
        """Whether the first layer that reads a tensor of ``shape`` has its channels last; None: there is none."""
        return next((last for seen, last in self._read if seen == shape), None)

    def last_writer(self, shape: torch.Size) -> bool | None:
        """The same for the last layer that gives a tensor of ``shape``."""
        return next((last for seen, last in reversed(self._written) if seen == shape), None)


def detect(
    frontier: Any,
    *,
    before: Witnesses,
    behind: Witnesses,
    previous: Modality | None,
    modules: Iterable[nn.Module],
    cut: str,
) -> Modality:
    """The modality of a frontier that :func:`~.modality.check_features` accepts.

    Args:
        before, behind: the segments that gave it and that read it. The last layer that gave a tensor of its shape
            decides; failing that the first one that reads one, the cut before (``previous``), and for three dimensions
            whether there are convolutions among ``modules``.
    """
    if is_point_cloud(frontier):
        return Points()
    shape = features(frontier).shape
    if len(shape) == 2:
        return Vectors()
    writer, reader = before.last_writer(shape), behind.first_reader(shape)
    if writer is not None and reader is not None and writer != reader:
        _log.info(
            "at the cut %r the channels of %s are taken to be %s: so says the layer before; the one behind differs",
            cut,
            tuple(shape),
            "last" if writer else "second",
        )
    last = writer if writer is not None else reader
    if last is None:
        kinds = {"tokens": (3,), "channels_last": (4, 5), "images": (3, 4, 5)}
        if previous is not None and len(shape) in kinds.get(previous.name, ()):
            return previous
        last = len(shape) == 3 and not any(isinstance(m, nn.modules.conv._ConvNd) for m in modules)
    if not last:
        return Images()
    return Tokens() if len(shape) == 3 else ChannelsLast()
