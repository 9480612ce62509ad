"""Batches and losses as the techniques see them: any loader, any loss, trees included."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..counting import as_arguments
from ..errors import CalibrationError

LossFunction = Callable[[Any, Any], Tensor]


def supervised_batches(data: Iterable[Any], device: torch.device, *, name: str) -> Iterator[tuple[Any, Any]]:
    """``(inputs, targets)`` of every batch on ``device``; a torch-geometric batch carries its ``y``.

    Raises:
        CalibrationError: a batch without targets, or no batch at all (an exhausted generator).
    """
    empty = True
    for batch in data:
        empty = False
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, targets = batch
        elif not isinstance(batch, Tensor) and getattr(batch, "y", None) is not None:
            inputs, targets = batch, batch.y
        else:
            raise CalibrationError(f"{name} must give (inputs, targets) pairs; got a {type(batch).__name__}")
        yield _move(inputs, device), _move(targets, device)
    if empty:
        raise CalibrationError(f"{name} gave no batch; pass a list or a loader, which can be read again")


def training_loss(net: nn.Module, inputs: Any, targets: Any, loss_fn: LossFunction | None) -> Tensor:
    """Scalar loss of one batch: ``loss_fn``, else a tree's own objective, else cross-entropy."""
    if loss_fn is not None:
        return loss_fn(net(*as_arguments(inputs)), targets)
    if hasattr(net, "forward_leaves"):
        loss: Tensor = net.loss(inputs, targets)  # type: ignore[operator]
        return loss
    return nn.functional.cross_entropy(logits_of(net(*as_arguments(inputs))), targets)


def differentiable_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose output depends on every weight: a tree's leaves are mixed (soft routing)."""
    working = copy.deepcopy(model).eval()
    if hasattr(working, "forward_leaves"):
        working.routing = "soft"  # type: ignore[assignment]
    return working


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``outputs.logits``, or the first item of a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise CalibrationError(
        f"cannot find logits in a {type(outputs).__name__}; pass loss_fn(outputs, targets)"
    )


def module_device(net: nn.Module) -> torch.device:
    """Device of the first parameter; CPU for a module without any."""
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_move(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") else value
