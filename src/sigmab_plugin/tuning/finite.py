"""Stop a run whose loss is not finite, and say where and what to try."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .distributed import all_gather_rows, is_distributed

#: Steps between looks at the loss where a look costs a synchronisation.
_INTERVAL = 25
_NEVER = 2**62


class FiniteLoss:
    """Watches the losses of one epoch.

    On a CPU alone every loss is checked before it changes a weight. On a GPU, or in a process group, the
    host looks every few steps, so that it does not wait for the device; the step reported is still exact.
    """

    def __init__(self, *, epoch: int, device: torch.device) -> None:
        self._epoch = epoch
        self._lazy = device.type != "cpu" or is_distributed()
        self._steps = 0
        self._bad = torch.zeros((), dtype=torch.long, device=device)  # finite losses before the first bad one
        self._good = torch.ones((), dtype=torch.bool, device=device)
        self._lr = math.nan

    def check(self, loss: Tensor, *, step: int, lr: float, inputs: Any) -> None:
        """Look at the loss of ``step`` (from 0).

        Raises:
            TrainingError: it is NaN or infinite.
        """
        self._lr = lr
        if not self._lazy:
            if not math.isfinite(loss.item()):
                self._fail(step, inputs_finite=_finite(inputs))
            return
        self._good &= torch.isfinite(loss.detach())
        self._bad += self._good
        self._steps += 1
        if self._steps % _INTERVAL == 0:
            self.finish()

    def finish(self) -> None:
        """Look at what was not looked at yet; all ranks together."""
        if not self._lazy:
            return
        bad = all_gather_rows(torch.where(self._good, _NEVER, self._bad).view(1))
        if int(bad.min()) < _NEVER:
            self._fail(int(bad.min()), inputs_finite=True)

    def _fail(self, step: int, *, inputs_finite: bool) -> None:
        if not inputs_finite:
            raise TrainingError(
                f"the inputs of epoch {self._epoch}, step {step + 1} hold NaN or infinity; check the data and its "
                "augmentation"
            )
        raise TrainingError(
            f"the loss is not finite at epoch {self._epoch}, step {step + 1} (lr {self._lr:.3g}); try a lower lr, "
            "more warmup_epochs, grad_clip=1.0 or amp=False, and look for NaN in inputs and weights. The last "
            "checkpoint is from before this epoch"
        )


def _finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_finite(item) for item in value)
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    tensors = (getattr(value, name, None) for name in ("x", "pos"))
    return all(_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor))
