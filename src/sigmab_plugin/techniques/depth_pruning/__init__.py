"""Depth pruning with auxiliary networks (arXiv 2204.10546): keep the first layers, close with a small head.

``technique`` is what the entry points offer; the functions here are for direct use.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from torch import nn

from ...errors import CalibrationError, ConfigError
from ..base import Context, Technique
from .config import DepthPruningConfig
from .cuts import CutPoint, enumerate_cuts
from .export import Int8Export, export_int8
from .leaves import is_tree, prune_leaves, train_leaf_heads
from .network import (
    AuxiliaryHead,
    DepthPrunedNet,
    depth_prune,
    load_depth_pruned,
    save_depth_pruned,
)
from .sweep import SweepResult, SweepRow, build, from_sweep, normalisation_macs, pareto, sweep
from .training import train

__all__ = [
    "AuxiliaryHead",
    "CutPoint",
    "DepthPrunedNet",
    "DepthPruningConfig",
    "Int8Export",
    "SweepResult",
    "SweepRow",
    "apply",
    "depth_prune",
    "enumerate_cuts",
    "export_int8",
    "from_sweep",
    "load_depth_pruned",
    "normalisation_macs",
    "pareto",
    "prune_leaves",
    "save_depth_pruned",
    "sweep",
    "technique",
    "train",
    "train_leaf_heads",
]

logger = logging.getLogger(__name__)


def apply(model: nn.Module, config: DepthPruningConfig, context: Context) -> nn.Module:
    """The depth-pruned network; a SigmaB net gets an auxiliary head on every leaf instead.

    With ``config.cut`` the network is cut there, and trained if ``context.train_data`` is given. Without,
    every cut is tried and the smallest network within ``config.max_drop`` of the model's score is
    returned: that needs ``train_data`` and ``validate``. ``context.options["folder"]`` makes
    the sweep resumable. ``config.freeze`` holds while the head trains; the result trains whole again, so
    that what follows in a list can fine-tune it, but for what was frozen in ``model``.

    Raises:
        ConfigError: no example inputs, no such cut, or an option that has no meaning for a SigmaB net.
        CalibrationError: a sweep without training data or validation.
    """
    if context.example_inputs is None:
        raise ConfigError(
            "depth_pruning: example_inputs is missing; give one batch, the graph is traced with it"
        )
    if is_tree(model):
        if config.num_classes is not None or config.cache_features:
            name = "num_classes" if config.num_classes is not None else "cache_features"
            raise ConfigError(
                f"depth_pruning: {name} has no meaning on a SigmaB net: its leaves keep their classes, and each reads "
                "a frontier of its own; leave the option out"
            )
        pruned = prune_leaves(
            model, context.example_inputs, cut=config.cut, head_widths=config.head_widths, seed=config.seed
        )
        if context.train_data is None:
            logger.info("depth_pruning: no train_data, the leaves' auxiliary heads keep their random weights")
        else:
            train_leaf_heads(pruned, context.train_data, config, loss_fn=context.loss_fn)
        return pruned
    if config.cut:
        net = build(model, context.example_inputs, config)
        if context.train_data is None:
            logger.info("depth_pruning: no train_data, the auxiliary head keeps its random weights")
        else:
            train(net, context.train_data, config, loss_fn=context.loss_fn)
        net.freeze(False)
        return net
    if context.train_data is None or context.validate is None:
        raise CalibrationError(
            "depth_pruning: choosing a cut needs train_data and validate; give both, or name the cut"
        )
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(context.options.get("folder", scratch))
        result = sweep(
            model,
            context.example_inputs,
            train_data=context.train_data,
            validate=context.validate,
            config=config,
            directory=directory,
            loss_fn=context.loss_fn,
        )
        chosen = result.smallest(max_drop=config.max_drop)
        logger.info("depth_pruning: chose the cut after %r", chosen.cut or "(nothing: the whole model)")
        return from_sweep(directory, chosen.cut, model, context.example_inputs)


technique = Technique(DepthPruningConfig, apply)
