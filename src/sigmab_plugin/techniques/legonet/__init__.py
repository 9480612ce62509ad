"""LegoNet (arXiv 2603.06606): all weights of a model from one codebook of small blocks.

The published claim (32 blocks of 4 x 4, 64 times smaller, no loss, no data, no retraining) does not
survive a check: 5 bits for 16 weights leave at least 65 % of a Gaussian layer's energy as error. The
method is built as published; :func:`measure` prints the real bytes and errors, and BatchNorm
re-estimation, scales and codebook fine-tuning win back what can be won.
"""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...errors import CalibrationError
from ...tuning.batchnorm import reestimate_batchnorm
from ..base import Context, Technique
from .bits import bits_per_index, pack_bits, unpack_bits
from .config import LegoNetConfig
from .finetune import finetune_codebook
from .lazy import LazyNodes
from .measure import PackingReport, gaussian_floor, measure
from .packed import PackedModel, PackedTensor, expand_into, pack
from .storage import LazyPackedModel, expand_node, load_packed, read_packed, save_packed

logger = logging.getLogger(__name__)

__all__ = [
    "LazyNodes",
    "LazyPackedModel",
    "LegoNetConfig",
    "PackedModel",
    "PackedTensor",
    "PackingReport",
    "bits_per_index",
    "compress",
    "expand_into",
    "expand_node",
    "finetune_codebook",
    "gaussian_floor",
    "load_packed",
    "measure",
    "pack",
    "pack_bits",
    "read_packed",
    "save_packed",
    "technique",
    "unpack_bits",
]


def compress(
    model: nn.Module, config: LegoNetConfig | None = None, context: Context | None = None
) -> PackedModel:
    """Pack ``model`` with everything that ``config`` asks for: fine-tuning, BatchNorm re-estimation.

    Raises:
        CalibrationError: the data an option needs is not in ``context``.
    """
    config, context = config or LegoNetConfig(), context or Context()
    packed = pack(model, config)
    if config.finetune_epochs:
        if context.train_data is None:
            raise CalibrationError("legonet: finetune_epochs needs train_data of (inputs, targets)")
        packed = finetune_codebook(
            packed,
            model,
            context.train_data,
            epochs=config.finetune_epochs,
            lr=config.finetune_lr,
            dense=config.finetune_dense,
            assignments=config.finetune_assignments,
            loss_fn=context.loss_fn,
        )
    if config.reestimate_batchnorm:
        if context.calibration_data is None:
            raise CalibrationError("legonet: reestimate_batchnorm needs calibration_data")
        net = expand_into(packed, model)
        if any(isinstance(module, _BatchNorm) for module in net.modules()):
            reestimate_batchnorm(net, context.calibration_data, example_inputs=context.example_inputs)
            packed = packed.with_dense(net)
        else:
            logger.info("legonet: reestimate_batchnorm finds no BatchNorm in %s", type(model).__name__)
    return packed


def apply(model: nn.Module, config: LegoNetConfig, context: Context) -> nn.Module:
    """The expanded model. Its attribute ``legonet`` is the :class:`PackedModel` to be saved."""
    packed = compress(model, config, context)
    logger.info("legonet: %s", measure(packed, model))
    expanded = expand_into(packed, model)
    expanded.legonet = packed  # type: ignore[assignment]
    return expanded


technique = Technique(LegoNetConfig, apply)
