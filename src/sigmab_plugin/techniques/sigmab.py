"""SigmaB as a technique: what the entry point ``nncf.algorithms: sigmab`` offers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import SigmaBConfig
from ..errors import CalibrationError
from .base import Context, Technique

if TYPE_CHECKING:
    from torch import nn


def apply(model: nn.Module, config: SigmaBConfig, context: Context) -> nn.Module:
    """Restructure ``model`` into a :class:`~sigmab_plugin.SigmaBNet`; ``model`` is left as it was.

    ``context.options["sigmab"]`` may hold further keyword arguments of ``SigmaBPruner``, such as ``forward_fn``.

    Raises:
        CalibrationError: no calibration data.
        ConfigError, ModelError: see ``SigmaBPruner``.
    """
    from ..hosts.torch_pruning import SigmaBPruner

    if context.calibration_data is None:
        raise CalibrationError(
            "sigmab clusters the calibration data, and there is none. Give the training set: calibration_dataset= "
            "of the call, or nncf.torch.register_default_init_args(nncf_config, train_loader) on NNCF 2.x."
        )
    options = dict(context.options.get("sigmab", {}))
    pruner = SigmaBPruner(
        model,
        context.example_inputs,
        calibration_data=context.calibration_data,
        config=config,
        **options,
    )
    net: nn.Module = pruner.step()
    return net


technique = Technique(SigmaBConfig, apply)
