"""Depth pruning for Torch-Pruning users: a pruner with the host's calling convention."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..techniques import depth_pruning
from ..techniques.base import Context
from ..techniques.depth_pruning import CutPoint, DepthPruningConfig, enumerate_cuts

_log = logging.getLogger(__name__)


class DepthPruner:
    """Keep the first layers and close with an auxiliary head (arXiv 2204.10546).

    The model given to it is left as it was; ``step()`` returns the new network. A SigmaB net gets an auxiliary head
    on every leaf.

    Args:
        model: any network that torch.fx traces and that has 2-D feature maps.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted.
        importance: accepted for the host's convention; layers are dropped by position, not by rank.
        cut: last layer that is kept; without it every cut is tried, which needs ``train_data`` and ``validate``.
        config: options; ``cut`` and keywords that are fields of :class:`DepthPruningConfig` win over it.
        train_data: re-iterable of ``(inputs, targets)`` for the head; without it the head stays untrained.
        validate: ``validate(model)`` -> score on a *validation* split, higher is better.
        loss_fn: ``loss_fn(logits, targets)``; cross-entropy where absent.
        folder: where the networks of a sweep are kept, to be resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any = None,
        *,
        cut: str | None = None,
        config: DepthPruningConfig | None = None,
        train_data: Iterable[Any] | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        loss_fn: Callable[[Any, Any], Any] | None = None,
        folder: str | os.PathLike[str] | None = None,
        **changes: Any,
    ) -> None:
        if importance is not None:
            _log.warning("DepthPruner drops layers by position; importance is not used")
        if cut is not None:
            changes["cut"] = cut
        try:
            self.config = (config or DepthPruningConfig()).replace(**changes)
        except TypeError as error:
            raise ConfigError(
                f"depth_pruning: {error}; options are the fields of DepthPruningConfig"
            ) from error
        self.model = model
        self._context = Context(
            example_inputs=example_inputs,
            train_data=train_data,
            validate=validate,
            loss_fn=loss_fn,
            seed=self.config.seed,
            options={} if folder is None else {"folder": folder},
        )

    def cuts(self) -> tuple[CutPoint, ...]:
        """Where the model can be cut, in order of execution."""
        return enumerate_cuts(self.model, self._context.example_inputs, granularity=self.config.granularity)

    def step(self) -> nn.Module:
        """The depth-pruned network, in eval mode.

        Raises:
            ConfigError, ModelError, CalibrationError: see :func:`sigmab_plugin.techniques.depth_pruning.apply`.
        """
        return depth_pruning.apply(self.model, self.config, self._context)
