"""What a loader may yield: (inputs, targets), or a torch-geometric batch that carries its targets as ``y``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and targets of one batch; inputs are a tensor, a tuple of arguments or a torch-geometric batch.

    Raises:
        TrainingError: neither form, or targets that are not class indices (B,) or soft labels (B, C).
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
    elif not isinstance(batch, Tensor) and isinstance(getattr(batch, "y", None), Tensor):
        inputs, targets = batch, batch.y
    else:
        raise TrainingError(
            f"a batch must be (inputs, targets) or a torch-geometric batch with y; got {_describe(batch)}"
        )
    if not isinstance(targets, Tensor):
        targets = torch.as_tensor(targets)
    soft = targets.dim() == 2 and targets.is_floating_point()
    indices = targets.dim() == 1 and not targets.is_floating_point() and not targets.is_complex()
    if not soft and not indices:
        raise TrainingError(
            "targets must be integer class indices (B,) or floating-point soft labels (B, C); got "
            f"{targets.dtype} {tuple(targets.shape)}"
        )
    return inputs, targets if soft else targets.long()


def inputs_of(batch: Any, *, example_inputs: Any = None) -> Any:
    """Inputs of one batch, with or without targets beside them.

    Args:
        batch: inputs (a tensor, a tuple of arguments, a torch-geometric batch) or ``(inputs, targets)``.
        example_inputs: one batch of inputs, where known. A pair is ``(inputs, targets)`` unless this is a pair as
            well: then two tensors are the two inputs.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return batch
    takes_two = isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 2
    return batch if takes_two and isinstance(batch[0], Tensor) else batch[0]


def sample_count(inputs: Any) -> int:
    """Samples in a batch of inputs: graphs of a torch-geometric batch, else rows of the first tensor."""
    graphs = getattr(inputs, "num_graphs", None)
    if graphs is not None:
        return int(graphs)
    parts = inputs.values() if isinstance(inputs, dict) else inputs
    if isinstance(inputs, (tuple, list, dict)):
        return next((sample_count(part) for part in parts if part is not None), 0)
    return len(inputs)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch, through tuples and lists, on ``device``; pinned memory is copied asynchronously."""
    if isinstance(value, (tuple, list)):
        return tuple(to_device(item, device) for item in value)
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value


def check_targets(targets: Tensor, classes: int) -> None:
    """Refuse class indices outside [0, classes) and soft labels of another width.

    Raises:
        TrainingError: naming the value and the number of classes.
    """
    if targets.dim() == 2:
        if targets.shape[1] != classes:
            raise TrainingError(f"soft labels have {targets.shape[1]} classes, the network has {classes}")
    elif targets.numel():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise TrainingError(
                f"target {low if low < 0 else high} is out of range: the network has {classes} classes "
                f"(0 to {classes - 1}); check the labels or the head's width"
            )


def check_shape(targets: Tensor, samples: int, classes: int) -> None:
    """Refuse targets that are not one per sample.

    Raises:
        TrainingError: naming the shapes expected and found.
    """
    if targets.shape not in ((samples,), (samples, classes)):
        raise TrainingError(
            f"targets must be class indices ({samples},) or soft labels ({samples}, {classes}); "
            f"got shape {tuple(targets.shape)}"
        )


def check_logits(output: Any) -> Tensor:
    """The output of a network, which must be logits (B, C).

    Raises:
        TrainingError: it is something else.
    """
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TrainingError(
            f"the network must return logits (B, C) to be trained or evaluated here; it returned {got}"
        )
    return output


def class_indices(targets: Tensor) -> Tensor:
    """(B,) class indices; of soft labels the largest entry."""
    return targets.argmax(1) if targets.dim() == 2 else targets


def _describe(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
