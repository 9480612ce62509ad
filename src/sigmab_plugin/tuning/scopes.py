"""What a training run changes for its duration only, and puts back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import ConfigError
from .distributed import world_size
from .evaluation import module_device


def backbone_of(net: nn.Module) -> nn.Module:
    """The part that all paths share.

    Raises:
        ConfigError: ``net`` is neither a tree nor a static twin.
    """
    backbone = getattr(net, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise ConfigError(
            f"freeze_backbone: {type(net).__name__} has no backbone; it is for trees and static twins"
        )
    return backbone


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """No gradients for ``module``'s parameters for a while."""
    parameters = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def left_as_found(net: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Puts back every submodule's mode, the gradients of ``net``, and the teacher's device."""
    modules = [*net.modules(), *(teacher.modules() if teacher is not None else ())]
    modes = [(module, module.training) for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in net.parameters()]
    place = None if teacher is None else module_device(teacher)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if teacher is not None:
            teacher.to(place)


@contextmanager
def synchronised(net: nn.Module, enabled: bool) -> Iterator[None]:
    """Swaps BatchNorm for SyncBatchNorm, which shares its tensors, and swaps the originals back."""
    if not enabled or world_size() == 1:
        yield
        return
    found = [
        (parent, name, child)
        for parent in net.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    for parent, name, child in found:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
