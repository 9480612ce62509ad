"""Mix-and-Match Pruning (arXiv 2603.20280): sparsity ranges observed per layer, ten strategies, three scores.

The published figures are the best of ten runs; here the choice is made on a validation split and the
mean and standard deviation over the ten are printed beside it.
"""

from __future__ import annotations

import logging

from torch import nn

from ...errors import CalibrationError
from ..base import Context, Technique
from .config import CRITERIA, ROLES, SCORES, STRATEGIES, MixAndMatchConfig
from .masks import (
    MaskKeeper,
    build_masks,
    load_masks,
    mask_sparsity,
    parametrize_masks,
    remove_masks,
    save_masks,
)
from .ranges import LayerRange, observe_ranges
from .results import Run, SearchResult, Spread
from .roles import LayerWeight, find_layers
from .scores import Sensitivity, measure_sensitivity
from .search import analyse, search
from .strategies import layer_sparsities
from .structured import StructuredRatios, structured_ratios
from .tuning import finetune_masked

logger = logging.getLogger(__name__)

__all__ = [
    "CRITERIA",
    "ROLES",
    "SCORES",
    "STRATEGIES",
    "LayerRange",
    "LayerWeight",
    "MaskKeeper",
    "MixAndMatchConfig",
    "Run",
    "SearchResult",
    "Sensitivity",
    "Spread",
    "StructuredRatios",
    "analyse",
    "build_masks",
    "find_layers",
    "finetune_masked",
    "layer_sparsities",
    "load_masks",
    "mask_sparsity",
    "measure_sensitivity",
    "observe_ranges",
    "parametrize_masks",
    "remove_masks",
    "save_masks",
    "search",
    "structured_ratios",
    "technique",
]


def apply(model: nn.Module, config: MixAndMatchConfig, context: Context) -> nn.Module:
    """The chosen run's model. Its attribute ``mix_and_match`` is the table of all runs (plain data)."""
    if context.example_inputs is None:
        raise CalibrationError("mix_and_match needs example_inputs: one batch that the model accepts")
    if context.validate is None:
        raise CalibrationError(
            "mix_and_match needs validate(model) -> score on a validation split, to choose among its runs"
        )
    # Hosts give inputs without targets as calibration data; ranges need targets, which training data have.
    calibration = context.calibration_data if context.train_data is None else None
    result = search(
        model,
        config,
        example_inputs=context.example_inputs,
        validate=context.validate,
        train_data=context.train_data,
        calibration_data=calibration,
        loss_fn=context.loss_fn,
        folder=context.options.get("folder"),
    )
    logger.info("mix_and_match:\n%s", result)
    result.model.mix_and_match = result.to_dict()  # type: ignore[assignment]
    return result.model


technique = Technique(MixAndMatchConfig, apply)
