"""Read calibration data: what is an input, what is a target, and what cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import CalibrationError
from ..tuning.distributed import all_gather_rows


class Calibration:
    """Checked, re-iterable view of the user's calibration data.

    Args:
        data: re-iterable of inputs or ``(inputs, targets)``.
        example: one batch of inputs; tells inputs from ``(inputs, targets)``.

    Raises:
        CalibrationError: missing, not iterable, or an iterator that can be read only once.
    """

    def __init__(self, data: Iterable[Any] | None, example: Any) -> None:
        if data is None:
            raise CalibrationError(
                "calibration_data is missing: give a re-iterable of inputs or (inputs, targets)"
            )
        # As iter() does, ask the type: __getitem__ alone is the old sequence protocol.
        if not hasattr(type(data), "__iter__") and not hasattr(type(data), "__getitem__"):
            hint = "; if it makes batches, give a list of them, list(...)" if callable(data) else ""
            raise CalibrationError(
                f"calibration_data is a {type(data).__name__} and cannot be iterated: give a list, a DataLoader, or an "
                f"object whose __iter__ starts afresh{hint}"
            )
        if iter(data) is data:
            raise CalibrationError(
                "calibration_data is a one-shot iterator, and it is read once per level: give a list, a DataLoader, "
                "or an object whose __iter__ starts afresh"
            )
        self._data = data
        self._example = _unwrapped(example)

    def batches(self) -> Iterator[Any]:
        """Inputs of each batch, one pass over the data.

        Raises:
            CalibrationError: empty; a batch of another structure, shape, dtype or device than the
                example; NaN; all targets of one class.
        """
        count = 0
        classes: set[int] = set()
        labelled = False
        for number, batch in enumerate(self._data):
            inputs, targets = self._split(batch, number)
            self._check(inputs, number)
            if torch.is_tensor(targets) and not targets.is_floating_point():
                labelled = True
                classes.update(targets.unique().tolist())
            count += 1
            yield inputs
        if count == 0:
            raise CalibrationError("calibration_data is empty")
        if labelled:
            everywhere = all_gather_rows(torch.tensor(sorted(classes))).unique().tolist()
            if len(everywhere) == 1:
                raise CalibrationError(
                    f"all calibration samples have target {everywhere[0]}: "
                    "branches that specialise need several classes"
                )

    def _split(self, batch: Any, number: int) -> tuple[Any, Any]:
        if _alike(_unwrapped(batch), self._example):
            return _unwrapped(batch), getattr(batch, "y", None)
        if (
            isinstance(batch, (tuple, list))
            and len(batch) == 2
            and _alike(_unwrapped(batch[0]), self._example)
        ):
            return _unwrapped(batch[0]), batch[1]
        raise CalibrationError(
            f"calibration batch {number} is {_describe(batch)}; expected inputs like example_inputs, "
            f"{_describe(self._example)}, or (inputs, targets)"
        )

    def _check(self, inputs: Any, number: int) -> None:
        for value, like in zip(_tensors(inputs), _tensors(self._example), strict=True):
            if value.device != like.device:
                raise CalibrationError(
                    f"calibration batch {number} is on {value.device}, example_inputs on {like.device}: "
                    "move one of them"
                )
            if value.is_floating_point() and value.dtype != like.dtype:
                raise CalibrationError(
                    f"calibration batch {number} is {_describe(value)}, example_inputs {_describe(like)}: "
                    "convert one of them"
                )
            if value.ndim >= 2 and value.shape[1] != like.shape[1]:
                raise CalibrationError(
                    f"calibration batch {number} has shape {tuple(value.shape)}, example_inputs {tuple(like.shape)}: "
                    "dimension 1 differs"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CalibrationError(f"calibration batch {number} holds NaN or infinite values")


def _unwrapped(inputs: Any) -> Any:
    """A tuple of one input is that input."""
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    return inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs


def _alike(value: Any, example: Any) -> bool:
    if torch.is_tensor(example):
        return (
            torch.is_tensor(value)
            and value.ndim == example.ndim
            and value.is_floating_point() == example.is_floating_point()
        )
    if isinstance(example, (tuple, list)):
        return (
            isinstance(value, (tuple, list))
            and len(value) == len(example)
            and all(_alike(v, e) for v, e in zip(value, example, strict=True))
        )
    if isinstance(example, dict):
        return isinstance(value, dict) and value.keys() == example.keys()
    return isinstance(value, type(example))


def _tensors(inputs: Any) -> list[torch.Tensor]:
    if torch.is_tensor(inputs):
        return [inputs]
    if isinstance(inputs, dict):
        return [t for value in inputs.values() for t in _tensors(value)]
    if isinstance(inputs, (tuple, list)):
        return [t for value in inputs for t in _tensors(value)]
    if hasattr(inputs, "pos") and torch.is_tensor(inputs.pos):  # torch-geometric data
        return [inputs.pos]
    return []


def _describe(value: Any) -> str:
    if torch.is_tensor(value):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_describe(item) for item in value)})"
    return type(value).__name__
