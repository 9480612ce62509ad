"""Unstructured masks: made from scores, held through training, stored."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import FormatError, ModelError
from .scores import Sensitivity


def build_masks(sensitivity: Sensitivity, sparsities: Mapping[str, float], score: str) -> dict[str, Tensor]:
    """Boolean masks, True = kept: each weight tensor loses its floor(rho n) lowest scores; ties by position."""
    masks = {}
    for name, sparsity in sparsities.items():
        importance = sensitivity.importance(score, name)
        mask = torch.ones(importance.numel(), dtype=torch.bool)
        # The smallest nudge keeps 0.3 * 10 at 3 where the product falls just below.
        drop = int(sparsity * importance.numel() + 1e-9)
        mask[importance.flatten().argsort(stable=True)[:drop]] = False
        if drop:
            masks[name] = mask.reshape(importance.shape)
    return masks


def mask_sparsity(masks: Mapping[str, Tensor], parameters: int) -> float:
    """Share of ``parameters`` that the masks drop."""
    return sum(int((~mask).sum()) for mask in masks.values()) / parameters


class MaskKeeper:
    """Keeps masked weights at zero: once now, and again after every step of ``optimizer``.

    Masking the gradient alone does not hold: momentum and weight decay move weights without it.
    Works as a context manager; leaving it removes the hook and leaves the zeros.
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                raise ModelError(
                    f"no weight {name!r} of shape {tuple(mask.shape)}; the masks are another model's"
                )
        self._pairs = [(parameters[name], mask.to(parameters[name].device)) for name, mask in masks.items()]
        self.apply()
        self._handle = None if optimizer is None else optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def apply(self) -> None:
        """Set masked weights to zero."""
        for parameter, mask in self._pairs:
            parameter.masked_fill_(~mask, 0)

    def _after_step(self, *_: Any) -> None:
        self.apply()

    def remove(self) -> None:
        """Stop following the optimiser."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> MaskKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class Mask(nn.Module):
    """Parametrization ``weight = original * mask``."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, original: Tensor) -> Tensor:
        return original * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def parametrize_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Hold ``masks`` in ``model`` itself (in place), for training loops that are not ours.

    A tied weight is masked wherever it is used. :func:`remove_masks` makes the zeros permanent.

    Raises:
        ModelError: a mask that fits no weight, or of a recurrent layer's; then no weight is masked.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: list[tuple[nn.Module, str, Mask]] = []
    for name, mask in masks.items():
        weight = parameters.get(name)
        if weight is None or weight.shape != mask.shape:
            raise ModelError(
                f"no weight {name!r} of shape {tuple(mask.shape)}; the masks are another model's"
            )
        for alias in [other for other, parameter in parameters.items() if parameter is weight]:
            path, _, tensor = alias.rpartition(".")
            owner = model.get_submodule(path)
            if isinstance(owner, nn.RNNBase):
                raise ModelError(
                    f"{alias} belongs to a recurrent layer, which reads its weights directly; use MaskKeeper"
                )
            found.append((owner, tensor, Mask(mask.to(weight.device))))
    for owner, tensor, held in found:
        parametrize.register_parametrization(owner, tensor, held)
    return model


def remove_masks(model: nn.Module) -> nn.Module:
    """Undo :func:`parametrize_masks` (in place); weights stay masked.

    Raises:
        ModelError: a masked weight has other parametrizations, which would go with the mask; then nothing is removed.
    """
    masked: list[tuple[nn.Module, str]] = []
    for name, module in model.named_modules():
        for tensor, chain in _chains(module):
            others = [type(item).__name__ for item in chain if not isinstance(item, Mask)]
            if any(isinstance(item, Mask) for item in chain):
                masked.append((module, tensor))
                if others:
                    raise ModelError(
                        f"{tensor!r} of {name!r} is parametrized by {', '.join(others)} as well, which would be lost "
                        "with the mask; use torch's remove_parametrizations for all of them"
                    )
    for module, tensor in masked:
        parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    return model


def _chains(module: nn.Module) -> Iterable[tuple[str, Iterable[nn.Module]]]:
    return module.parametrizations.items() if parametrize.is_parametrized(module) else ()  # type: ignore[operator, union-attr, return-value]


def save_masks(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks as a safetensors file, a byte per weight."""
    save_file({name: mask.to("cpu", torch.uint8).contiguous() for name, mask in masks.items()}, Path(path))


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read :func:`save_masks`' file. Raises :class:`FormatError` where it is damaged or holds something else."""
    try:
        stored = load_file(Path(path))
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} holds no masks: {error}") from error
    for name, mask in stored.items():
        if mask.dtype != torch.uint8 or bool((mask > 1).any()):
            raise FormatError(f"{path} holds no masks: {name!r} is no byte of 0 or 1 per weight")
    return {name: mask.bool() for name, mask in stored.items()}
