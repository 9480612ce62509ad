"""Calibration data, with or without targets, in the form that BatchNorm re-estimation reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


class CalibrationPairs:
    """Re-iterable view of ``data`` as (inputs, targets); the targets are zeros, only their number is used.

    Args:
        data: re-iterable of inputs or ``(inputs, targets)``.
        example: one batch of inputs, if known; a tuple of two tells two inputs from inputs and targets.
    """

    def __init__(self, data: Iterable[Any], example: Any = None) -> None:
        self._data = data
        self._takes_two = isinstance(example, (tuple, list)) and len(example) == 2

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for batch in self._data:
            inputs = batch
            if isinstance(batch, (tuple, list)) and len(batch) == 2:
                two_inputs = self._takes_two and isinstance(batch[0], Tensor)
                inputs = batch if two_inputs else batch[0]
            yield inputs, torch.zeros(_samples(inputs), dtype=torch.long)


def _samples(inputs: Any) -> int:
    if isinstance(inputs, (tuple, list)):
        inputs = inputs[0]
    graphs = getattr(inputs, "num_graphs", None)
    return int(graphs) if graphs is not None else len(inputs)
