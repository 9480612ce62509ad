"""SigmaB for Torch-Pruning users: a pruner with the host's calling convention."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from ..config import SigmaBConfig, WidthSpec
from ..errors import ConfigError, ModelError
from ..tree.build import Allocation, Builder
from ..tree.calibration import Calibration
from ..tree.net import SigmaBNet
from ..tree.prepare import prepare
from ..tree.twin import StaticTwin, build_twin

_log = logging.getLogger(__name__)

# Torch-Pruning renamed its base class in 1.5.2.
_Base: Any = getattr(tp.pruner, "BasePruner", None) or tp.pruner.MetaPruner


class SigmaBPruner(_Base):  # type: ignore[misc]
    """Restructure a pretrained network into a SigmaB tree (arXiv 2606.09924).

    A Torch-Pruning pruner by its constructor and ``step()``. It differs in two ways: the model given
    to it is never modified, and ``step()`` returns the new network.

    Args:
        model: the dense network, any module that the DependencyGraph can trace.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted, a dict is keywords.
        importance: a Torch-Pruning importance, for the channels that are chosen by norm (inner planes);
            default: the L1 norm of the filters.
        calibration_data: re-iterable of inputs or ``(inputs, targets)``, read once per level.
        levels, head: module names in order of execution, or ``config=``.
        segments: ``[backbone, level, ..., head]`` where the model cannot be traced; replaces ``levels``.
        config: a :class:`SigmaBConfig`; other keywords that are given win over its fields.
        ignored_layers, customized_pruners, unwrapped_parameters, root_module_types, forward_fn,
            output_transform, round_to: as in Torch-Pruning.
        progress: called with (level name, samples done); ``None`` is silent.

    Raises:
        ConfigError, ModelError: before any data is read; the message says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[[Any], torch.Tensor | None] | None = None,
        *,
        calibration_data: Iterable[Any] | None = None,
        levels: Sequence[str] | None = None,
        head: str | None = None,
        config: SigmaBConfig | None = None,
        segments: Sequence[nn.Module] | None = None,
        shared_ratio: float | None = None,
        projection_dim: int | None = None,
        widths: Mapping[str, WidthSpec] | None = None,
        active_ratio: float | None = None,
        seed: int | None = None,
        ignored_layers: Sequence[Any] | None = None,
        customized_pruners: Mapping[type[nn.Module], Any] | None = None,
        unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
        root_module_types: Sequence[type] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        round_to: int | None = None,
        progress: Callable[[str, int], None] | None = None,
    ) -> None:
        # The base class would trace the whole model at once and keep its graph: the tail alone is
        # traced here, on a copy, and the graph is dropped once the groups are plain data.
        given = {
            # A string is left to the config, which refuses it: as a tuple it would be letters.
            "levels": tuple(levels) if levels is not None and not isinstance(levels, str) else levels,
            "head": head,
            "shared_ratio": shared_ratio,
            "projection_dim": projection_dim,
            "widths": dict(widths) if widths is not None else None,
            "active_ratio": active_ratio,
            "seed": seed,
            "round_to": round_to,
        }
        changes = {key: value for key, value in given.items() if value is not None}
        self.config = (config or SigmaBConfig()).replace(**changes)
        self.model = model
        self.importance = importance
        self.current_step = 0
        self._calibration_data = calibration_data
        self._progress = progress
        self._net: SigmaBNet | None = None
        self.prepared = prepare(
            model,
            example_inputs,
            config=self.config,
            segments=segments,
            importance=importance,
            ignored_layers=ignored_layers,
            customized_pruners=customized_pruners,
            unwrapped_parameters=unwrapped_parameters,
            root_module_types=root_module_types,
            forward_fn=forward_fn,
            output_transform=output_transform,
        )

    def step(self, interactive: bool = False) -> Any:
        """Restructure.

        Returns:
            The :class:`SigmaBNet`; or, if ``interactive``, a generator of every branch's
            :class:`Allocation` before it is used, which may edit ``allocation.keep`` and whose
            return value (and ``pruner.net`` afterwards) is the net.

        Raises:
            CalibrationError: the calibration data cannot be used.
        """
        self.current_step += 1
        steps = self._steps()
        if interactive:
            return steps
        while True:
            try:
                next(steps)
            except StopIteration as finished:
                return finished.value

    def _steps(self) -> Generator[Allocation, None, SigmaBNet]:
        builder = Builder(self.prepared, Calibration(self._calibration_data, self.prepared.example))
        yield from builder.run(self._progress)
        self._net = builder.net()
        return self._net

    @property
    def net(self) -> SigmaBNet:
        """The network of the last completed ``step``."""
        if self._net is None:
            raise ConfigError("no step has been completed: call step(), or exhaust step(interactive=True)")
        return self._net

    def static_twin(self) -> StaticTwin:
        """One path of the same shape; see :func:`sigmab_plugin.static_twin`."""
        return build_twin(self.prepared, self._calibration_data)

    def _unavailable(self, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(
            "SigmaBPruner builds a new network and prunes nothing in place: this method has no meaning"
        )

    manual_prune_width = pruning_history = load_pruning_history = update_regularizer = regularize = (
        _unavailable
    )
