"""A training batch of one sample, of which BatchNorm has no variance where it gets one value per sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from ..errors import TrainingError

_REMEDY = "give the training loader drop_last=True, or a batch size that leaves no batch of one sample"


def has_lone_sample(loader: Any) -> bool:
    """Whether the last batch of a DataLoader or of the package's Loader holds one sample; False if not known."""
    from ..data import Loader

    size = getattr(loader, "batch_size", None)
    if not isinstance(size, int) or getattr(loader, "drop_last", False):
        return False
    if isinstance(loader, Loader):
        return (len(loader.order()) - 1) % size == 0
    if not isinstance(loader, torch.utils.data.DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    try:
        return (len(loader.sampler) - 1) % size == 0  # type: ignore[arg-type]
    except TypeError:
        return False


@contextmanager
def lone_sample_refused(net: nn.Module, samples: int, *, ahead: bool) -> Iterator[None]:
    """Around a forward pass: BatchNorm that cannot train on one sample is reported with the remedy.

    Args:
        net: the network that is trained.
        samples: in this batch.
        ahead: a batch of one sample is still to come: refuse now a BatchNorm that gets one value per sample.

    Raises:
        TrainingError: naming the module where it is known.
    """
    with ExitStack() as hooks:
        if ahead:
            for name, module in net.named_modules():
                # The synchronised one takes its variance from all processes.
                if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
                    hooks.callback(module.register_forward_pre_hook(_refuse(name, samples)).remove)
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise TrainingError(
                f"BatchNorm cannot train on a batch of one sample ({error}); {_REMEDY}"
            ) from error


def _refuse(name: str, samples: int) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not arguments or not module.training:
            return
        values = arguments[0]
        if values.shape[0] == samples and values[0].numel() == values.shape[1]:
            raise TrainingError(
                f"the last training batch holds one sample, on which BatchNorm {name!r} cannot train; {_REMEDY}"
            )

    return hook
