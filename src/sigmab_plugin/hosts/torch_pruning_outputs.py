"""What a network gives before and after Torch-Pruning has cut it: its logits must keep their shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, ModelError
from ..techniques.supervised import logits_of


@torch.no_grad()
def logits_before(net: nn.Module, arguments: tuple[Any, ...], *, algorithm: str) -> Tensor:
    """The logits of one batch. Raises :class:`ModelError` where the output has none."""
    try:
        return logits_of(net(*arguments))
    except CalibrationError as error:
        raise ModelError(
            f"{algorithm}: {type(net).__name__} gives no logits ({error}); return them as a tensor, as the first of a "
            "tuple, or as the output's attribute 'logits'"
        ) from error


@torch.no_grad()
def check_logits(net: nn.Module, arguments: tuple[Any, ...], shape: torch.Size, *, algorithm: str) -> None:
    """Run the pruned ``net`` once.

    Raises:
        ModelError: it does not run, or its logits have another shape than before.
    """
    try:
        found = logits_of(net(*arguments)).shape
    except Exception as error:
        raise ModelError(
            f"{algorithm}: the pruned {type(net).__name__} does not run ({error}); name the layers whose width its "
            "forward has fixed in ignored_layers"
        ) from error
    if found != shape:
        raise ModelError(
            f"{algorithm}: the pruned {type(net).__name__} gives logits of shape {tuple(found)} instead of "
            f"{tuple(shape)}; name its classifier in ignored_layers"
        )


def require_gradients(net: nn.Module) -> None:
    """Frozen parameters are invisible to the dependency graph; integers have no gradients."""
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
