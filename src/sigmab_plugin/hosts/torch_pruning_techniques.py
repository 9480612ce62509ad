"""The companion techniques for Torch-Pruning users: pruners with the host's calling convention.

``Pruner(model, example_inputs, importance, ...).step()`` returns the compressed module; the model given to
it is left as it was, as with :class:`~sigmab_plugin.hosts.torch_pruning.SigmaBPruner`.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch_pruning as tp
from torch import Tensor, nn

from ..config import TechniqueConfig
from ..counting import as_arguments, parameter_count
from ..errors import CalibrationError, ConfigError
from ..techniques import legonet, mix_and_match
from ..techniques.base import Context
from ..techniques.compose import order_problems
from ..techniques.legonet import LegoNetConfig, PackedModel, PackingReport
from ..techniques.mix_and_match import MixAndMatchConfig, SearchResult, find_layers, structured_ratios
from ..techniques.mix_and_match.roles import class_count, matches
from ..techniques.supervised import LossFunction
from .torch_pruning_outputs import check_logits, logits_before, require_gradients

_log = logging.getLogger(__name__)

C = TypeVar("C", bound=TechniqueConfig)


def _configure(
    config: C | None,
    kind: type[C],
    model: nn.Module,
    changes: Mapping[str, Any],
    ignored: Sequence[nn.Module] | None,
    *,
    dimensions: int,
) -> C:
    """``config`` with the keywords given, and the host's list of modules as names.

    Modules without a parameter of ``dimensions`` or more mean nothing to the technique and are dropped.
    """
    try:
        merged = kind(**changes) if config is None else config.replace(**changes)
    except TypeError as error:
        raise ConfigError(f"{kind.algorithm}: {error}; options are the fields of {kind.__name__}") from error
    if not ignored:
        return merged
    names = {id(module): name for name, module in model.named_modules()}
    missing = [module for module in ignored if id(module) not in names]
    if missing:
        raise ConfigError(f"{kind.algorithm}: ignored_layers: {missing[0]!r} is no module of this model")
    concerned = [module for module in ignored if any(p.ndim >= dimensions for p in module.parameters())]
    patterns = tuple(glob.escape(names[id(module)]) for module in concerned)
    return merged.replace(ignored_layers=(*merged.ignored_layers, *patterns))  # type: ignore[attr-defined]


class LegoNetPruner:
    """All weights from one codebook of small blocks (arXiv 2603.06606).

    Args:
        model: any module.
        example_inputs, importance: accepted for the host's convention; blocks need neither.
        config: options; keywords that are fields of :class:`LegoNetConfig` win over it.
        calibration_data: re-iterable, for BatchNorm re-estimation.
        train_data: re-iterable of ``(inputs, targets)``, for codebook fine-tuning.
        ignored_layers: modules to leave dense.

    Attributes:
        packed: what ``step()`` packed; ``sigmab_plugin.techniques.legonet.save_packed`` writes it.
        report: real sizes and errors.
    """

    packed: PackedModel
    report: PackingReport

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        importance: Any = None,
        *,
        config: LegoNetConfig | None = None,
        calibration_data: Iterable[Any] | None = None,
        train_data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        ignored_layers: Sequence[nn.Module] | None = None,
        **changes: Any,
    ) -> None:
        if importance is not None:
            _log.warning("LegoNetPruner does not rank channels; importance is not used")
        self.model = model
        self.config = _configure(config, LegoNetConfig, model, changes, ignored_layers, dimensions=2)
        self._context = Context(
            example_inputs=example_inputs,
            calibration_data=calibration_data,
            train_data=train_data,
            loss_fn=loss_fn,
        )

    def step(self) -> nn.Module:
        """The model expanded from its codebook."""
        net = legonet.apply(self.model, self.config, self._context)
        self.packed = net.legonet  # type: ignore[assignment]
        self.report = legonet.measure(self.packed, self.model)
        return net


class MixAndMatchPruner:
    """Observed sparsity ranges, ten strategies, three scores; the best on a validation split (arXiv 2603.20280).

    Args:
        model: trained module.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted.
        importance: ranks channels with ``structured``, default: L2 norm of filters; not used with masks.
        validate: ``validate(model)`` -> score on a *validation* split, higher is better. Required.
        config: options; keywords that are fields of :class:`MixAndMatchConfig` win over it.
        calibration_data: re-iterable of ``(inputs, targets)``; by default a share of ``train_data``.
        train_data: re-iterable of ``(inputs, targets)``, for fine-tuning.
        structured: remove channels at each layer's sparsity instead of masking weights.
        folder: where runs are kept, to be resumed.
        ignored_layers: modules to leave dense; with ``structured`` none of their channels go.
        customized_pruners, unwrapped_parameters, root_module_types, forward_fn, output_transform,
            round_to: as in Torch-Pruning, for ``structured``.

    Raises:
        CalibrationError: ``validate`` is missing.
        ConfigError: ``structured`` on a SigmaB net, whose plan records its widths, or with what names tensors or
            modules of the model, of which copies are pruned.

    Attributes:
        result: the table of all runs, after ``step()``.
    """

    result: SearchResult

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[[Any], Tensor | None] | None = None,
        *,
        validate: Callable[[nn.Module], float] | None = None,
        config: MixAndMatchConfig | None = None,
        calibration_data: Iterable[Any] | None = None,
        train_data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        structured: bool = False,
        folder: str | os.PathLike[str] | None = None,
        ignored_layers: Sequence[nn.Module] | None = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        unwrapped_parameters: Sequence[tuple[nn.Parameter, int]] | None = None,
        root_module_types: Sequence[type] | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        round_to: int | None = None,
        **changes: Any,
    ) -> None:
        if validate is None:
            raise CalibrationError(
                "MixAndMatchPruner needs validate=..., a function of the model that gives its score on a "
                "validation split; it chooses among all runs"
            )
        self.model = model
        self.example_inputs = example_inputs
        self.importance = importance
        self.config = _configure(config, MixAndMatchConfig, model, changes, ignored_layers, dimensions=1)
        self.structured = structured
        self._data = {"calibration_data": calibration_data, "train_data": train_data}
        self._validate, self._loss_fn, self._folder = validate, loss_fn, folder
        graph: dict[str, Any] = {
            "customized_pruners": customized_pruners,
            "unwrapped_parameters": unwrapped_parameters,
            "root_module_types": root_module_types,
            "forward_fn": forward_fn,
            "output_transform": output_transform,
            "round_to": round_to,
        }
        self._graph = {key: value for key, value in graph.items() if value is not None}
        if unwrapped_parameters is not None and structured:
            raise ConfigError(
                "unwrapped_parameters name tensors of the model, and copies are pruned; leave it out"
            )
        instances = [key for key in customized_pruners or () if not isinstance(key, type)]
        if instances and structured:
            raise ConfigError(
                f"customized_pruners: {type(instances[0]).__name__} is given as an instance, and copies are pruned; "
                "give the class"
            )
        if structured and any(hasattr(module, "forward_leaves") for module in model.modules()):
            (problem,) = order_problems(("sigmab", "torch_pruning"))
            raise ConfigError(f"MixAndMatchPruner(structured=True) on a SigmaB net: {problem.reason}")

    def step(self) -> nn.Module:
        """Try all runs; the chosen one's model, fine-tuned, in eval mode."""
        self.result = mix_and_match.search(
            self.model,
            self.config,
            example_inputs=self.example_inputs,
            validate=self._validate,
            loss_fn=self._loss_fn,
            prune=self._remove_channels if self.structured else None,
            folder=self._folder,
            **self._data,
        )
        _log.info("mix_and_match:\n%s", self.result)
        return self.result.model

    def _remove_channels(self, net: nn.Module, sparsities: Mapping[str, float]) -> nn.Module:
        """``net`` (a copy of the model), pruned by Torch-Pruning at one strategy's ratios."""
        layers = find_layers(net, self.example_inputs, self.config)
        arguments = as_arguments(self.example_inputs)
        net.eval()
        logits = logits_before(net, arguments, algorithm="mix_and_match")
        ratios = structured_ratios(
            net, layers, sparsities, classes=class_count(logits), match=self.config.structured_match
        )
        # Without these a layer that is left alone would still be narrowed by those it is coupled with.
        whole = [m for n, m in net.named_modules() if matches(n, self.config.ignored_layers)]
        before = parameter_count(net)
        flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
        require_gradients(net)
        base: Any = getattr(tp.pruner, "BasePruner", None) or tp.pruner.MetaPruner
        base(
            net,
            arguments,
            self.importance or tp.importance.MagnitudeImportance(),
            pruning_ratio=0.0,
            pruning_ratio_dict=ratios.pruning_ratio_dict,
            ignored_layers=[*ratios.ignored_layers, *whole],
            **{"in_channel_groups": {}, "out_channel_groups": {}, **self._graph},
        ).step()
        if parameter_count(net) == before and any(ratios.pruning_ratio_dict.values()):
            _log.warning("Torch-Pruning removed nothing at these ratios; widths may be too small for them")
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
            parameter.grad = None
        check_logits(net, arguments, logits.shape, algorithm="mix_and_match")
        return net
