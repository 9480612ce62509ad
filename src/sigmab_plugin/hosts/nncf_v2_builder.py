"""NNCF 2.x builders: one per technique, and the composite that carries a list out in order.

NNCF's own composite lets every algorithm plan on the same graph and applies all plans at once. A technique that builds
new layers cannot take part in that, so lists with a technique are carried out by :class:`OrderedCompositeBuilder`:

* sections before the last technique are finished on the network as it then is (masks at their target, stripped);
* the technique replaces the network by a fresh ``NNCFNetwork``;
* sections behind it are planned and applied on that network by NNCF's builders, together, as NNCF does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from nncf import NNCFConfig
from nncf.config.extractors import extract_algorithm_names
from nncf.torch import model_creation
from nncf.torch.algo_selector import PT_COMPRESSION_ALGORITHMS
from nncf.torch.composite_compression import PTCompositeCompressionAlgorithmBuilder
from nncf.torch.compression_method_api import PTCompressionAlgorithmBuilder
from nncf.torch.graph.transformations.layout import PTTransformationLayout
from nncf.torch.model_transformer import PTModelTransformer
from nncf.torch.nncf_network import NNCFNetwork
from torch import nn

from ..config import SigmaBConfig
from ..counting import parameter_count
from ..errors import ConfigError, FormatError
from ..techniques.base import Technique
from ..tree.net import ParameterCounts, SigmaBNet
from .nncf_needs import REGISTERED, check_needs
from .nncf_outcome import outcome
from .nncf_schema import check, check_levels, hide_untraced, sections, techniques
from .nncf_v2_calibration import lone_samples_normalised, ranges_for_every_leaf
from .nncf_v2_controller import (
    FinishedController,
    OrderedCompositeController,
    TechniqueController,
    TreeController,
)
from .nncf_v2_data import context_of, registered
from .nncf_v2_network import adopt, rewrap, unwrap, weights_of
from .nncf_v2_scopes import config_for_new_network
from .nncf_v2_statistics import summary

_log = logging.getLogger(__name__)
#: Attribute of an ``NNCFConfig``: the model that it is used for is a SigmaB net. The builder is made without the model.
_TREE_GIVEN = "_sigmab_tree_given"


class TechniqueBuilder(PTCompressionAlgorithmBuilder):
    """Applies one technique of the group ``nncf.algorithms`` and returns a network around the result."""

    algorithm: ClassVar[str]

    @property
    def technique(self) -> Technique:
        try:
            return techniques()[self.algorithm]
        except KeyError:
            raise ConfigError(
                f"{self.algorithm}: the package that offers this algorithm cannot be loaded; see the log for the reason"
            ) from None

    def __init__(self, config: NNCFConfig, should_init: bool = True) -> None:
        super().__init__(config, should_init)
        check(config)
        section = {key: value for key, value in self._algo_config.items() if key in self._own_keys()}
        self.section = self.technique.config.from_dict(section)
        self._state: dict[str, Any] = {}
        self._dense_parameters = 0
        self._counts: ParameterCounts | None = None
        self._outcome: tuple[str, dict[str, Any]] = ("", {})

    def _own_keys(self) -> set[str]:
        return set(self.technique.config.json_schema()["properties"])

    def apply_to(self, model: NNCFNetwork) -> NNCFNetwork:
        """A new network; the module in ``model`` gets its own classes back and keeps its weights."""
        interface = model.nncf
        try:
            context = context_of(self.config, model)
        finally:
            dense = unwrap(model)
        if self.should_init:
            check_registered(self.config)
            module = self.technique.apply(dense, self.section, context)
        else:
            module = self._restore(dense, context)
        self._state = self._state_of(dense, module)
        self._dense_parameters = parameter_count(dense)
        self._outcome = outcome(dense, module)
        if isinstance(module, SigmaBNet):
            self._counts = module.parameter_counts()
            adopt(module, dense)
        module.train(dense.training)
        return rewrap(module, interface)

    def _restore(self, dense: nn.Module, context: Any) -> nn.Module:
        if "plan" in self._state:
            return _tree_from_plan(dense, self._state["plan"])
        shapes = self._state.get("shapes")
        if shapes == _shapes(dense):
            return deepcopy(dense)
        module = self.technique.apply(dense, self.section, context)
        if shapes is not None and shapes != _shapes(module):
            raise FormatError(
                f"{self.name}: the compression state was written for other tensors than this model and config give; "
                "use the model, the config file and the data of the run that wrote it"
            )
        return module

    @staticmethod
    def _state_of(dense: nn.Module, module: nn.Module) -> dict[str, Any]:
        if isinstance(module, SigmaBNet):
            return {"plan": module.plan.to_dict()}
        return {"shapes": _shapes(module)}

    def _get_state_without_name(self) -> dict[str, Any]:
        return self._state

    def _load_state_without_name(self, state_without_name: dict[str, Any]) -> None:
        self._state = state_without_name

    def _build_controller(self, model: NNCFNetwork) -> TechniqueController | TreeController:
        if isinstance(self.section, SigmaBConfig):
            assert self._counts is not None
            return TreeController(
                model, self.section, dense_parameters=self._dense_parameters, counts=self._counts
            )
        return TechniqueController(model, self.section, *self._outcome)

    def get_transformation_layout(self, model: NNCFNetwork) -> PTTransformationLayout:
        raise NotImplementedError(
            "a technique replaces the network (apply_to); it has no layout of insertions"
        )

    def initialize(self, model: NNCFNetwork) -> None:
        """Nothing left to do: the technique has set every weight."""


def _tree_from_plan(dense: nn.Module, plan: Mapping[str, Any]) -> SigmaBNet:
    from ..tree.io import assemble
    from ..tree.plan import Plan

    return assemble(Plan.from_dict(plan), dense)


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


class OrderedCompositeBuilder(PTCompositeCompressionAlgorithmBuilder):
    """See the module's docstring.

    On a model that is a SigmaB net it carries out every list, one of a single section included: NNCF's own way would
    see one path. Lists without a technique for other models go to NNCF's own composite, unchanged.
    """

    def __init__(self, config: NNCFConfig, should_init: bool = True) -> None:
        names = extract_algorithm_names(config)
        offered = techniques()
        self._split = max((i + 1 for i, name in enumerate(names) if name in offered), default=0)
        self._tree = getattr(config, _TREE_GIVEN, False)
        self._ordered = self._split > 0 or self._tree
        self._finished: dict[str, dict[str, str]] = {}
        if not self._ordered:
            super().__init__(config, should_init)
            return
        # Past NNCF's composite, which refuses a list of one; a tree needs this class for one section, too.
        super(PTCompositeCompressionAlgorithmBuilder, self).__init__(config, should_init)
        for name in names:
            self._child_builders.append(PT_COMPRESSION_ALGORITHMS.get(name)(config, should_init=should_init))
        check(config)
        # NNCF's builders read their scopes from the config when they are made, so the ones that will see the new
        # network are made from a copy in which the scopes are written for it.
        later = config_for_new_network(config, self._split, tree=self._tree)
        for number in range(self._split, len(names)):
            builder = PT_COMPRESSION_ALGORITHMS.get(names[number])
            self._child_builders[number] = builder(later, should_init=should_init)

    def apply_to(self, model: NNCFNetwork) -> NNCFNetwork:
        if not self._ordered:
            return super().apply_to(model)
        if self._split:
            model = self._restructure(model)
        return self._apply_later(model)

    def _restructure(self, model: NNCFNetwork) -> NNCFNetwork:
        """Carry the sections up to the last technique out; the given network is left as it was."""
        weights = weights_of(model) if self._split > 1 else None
        original = model
        try:
            if self.should_init:
                check_registered(self._config)
            for child in self.child_builders[: self._split]:
                model = (
                    child.apply_to(model)
                    if isinstance(child, TechniqueBuilder)
                    else self._finish(child, model)
                )
        finally:
            unwrap(original)
            if weights is not None:
                original.load_state_dict(weights)
        return model

    def _apply_later(self, model: NNCFNetwork) -> NNCFNetwork:
        """Plan the sections behind the last technique on the network as it now is, and apply them together."""
        layout = PTTransformationLayout()
        later = self.child_builders[self._split :]
        for child in later:
            with ranges_for_every_leaf(model, child):
                layout.update(child.get_transformation_layout(model))
        transformed: NNCFNetwork = PTModelTransformer(model).transform(layout)
        for child in later:
            if child.should_init:
                with lone_samples_normalised(transformed):
                    child.initialize(transformed)
        return transformed

    def _finish(self, child: PTCompressionAlgorithmBuilder, model: NNCFNetwork) -> NNCFNetwork:
        """Carry an algorithm of NNCF's own out at once, up to its target, and fix the result in the weights."""
        if not child.should_init:
            return model  # the weights come from the checkpoint
        interface = model.nncf
        model = child.apply_to(model)
        controller = child.build_controller(model)
        target = getattr(controller.scheduler, "target_level", None)
        if target is not None:
            controller.compression_rate = target
        with torch.no_grad():
            controller.prepare_for_export()
            model = controller.strip_model(model)
        _restore_buffers(model)
        statistics = controller.statistics()
        line = "; ".join(summary(entry)[0] for _, entry in statistics)
        self._finished[child.name] = {"table": statistics.to_str(), "line": line}
        _log.info(
            "%s: carried out on the network before the restructuring, up to its target %s", child.name, target
        )
        return rewrap(unwrap(model), interface)

    def _build_controller(self, model: NNCFNetwork) -> Any:
        if not self._ordered:
            return super()._build_controller(model)
        standard = all(
            entry.values.get("export_to_onnx_standard_ops", True) for entry in sections(self._config)
        )
        composite = OrderedCompositeController(model, standard_operators=standard)
        for child in self.child_builders:
            if child.name in self._finished:
                controller = FinishedController(model, self._finished[child.name])
                controller.set_builder_state_with_name(child.name, {child.name: {}})
                composite.add(controller)
            elif isinstance(child, TechniqueBuilder) or child in self.child_builders[self._split :]:
                composite.add(child.build_controller(model))
        return composite

    def get_state(self) -> dict[str, Any]:
        state = super().get_state()
        for name, done in self._finished.items():
            state[name] = {"finished": done}
        return state

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        self._finished = {
            name: entry["finished"] for name, entry in state.items() if "finished" in (entry or {})
        }
        super().load_state({name: entry for name, entry in state.items() if name not in self._finished})


def _restore_buffers(model: nn.Module) -> None:
    """NNCF's pruner leaves running statistics behind as parameters; make them buffers again."""
    for module in model.modules():
        for name in ("running_mean", "running_var"):
            value = module._parameters.get(name)
            if value is not None:
                del module._parameters[name]
                module.register_buffer(name, value.detach())


# ---------------------------------------------------------------- registration


def register_builders(names: Iterable[str]) -> None:
    """Add a builder per technique to NNCF's registry, and let lists with a technique be carried out in order."""
    for name in names:
        if name not in PT_COMPRESSION_ALGORITHMS.registry_dict:
            kind = f"{name.title().replace('_', '')}Builder"
            PT_COMPRESSION_ALGORITHMS.register(name)(type(kind, (TechniqueBuilder,), {"algorithm": name}))
    if model_creation.PTCompositeCompressionAlgorithmBuilder is not OrderedCompositeBuilder:
        model_creation.PTCompositeCompressionAlgorithmBuilder = OrderedCompositeBuilder
        model_creation.create_nncf_network = _checking(model_creation.create_nncf_network)
        model_creation.create_compression_algorithm_builder = _for_trees(
            model_creation.create_compression_algorithm_builder
        )


def _checking(original: Any) -> Any:
    """``create_nncf_network`` is the first step of ``create_compressed_model``: refuse here, before any change."""

    def create_nncf_network(model: nn.Module, config: NNCFConfig, *args: Any, **kwargs: Any) -> NNCFNetwork:
        check_against_model(model, config)
        hide_untraced(model)
        setattr(config, _TREE_GIVEN, isinstance(model, SigmaBNet))
        if isinstance(model, SigmaBNet):  # a copy: NNCF needs a class of its own, and modules for pooling
            model = adopt(deepcopy(model), model.backbone)
        return original(model, config, *args, **kwargs)

    return create_nncf_network


def _for_trees(original: Any) -> Any:
    def create_compression_algorithm_builder(config: NNCFConfig, should_init: bool = True) -> Any:
        if getattr(config, _TREE_GIVEN, False) and extract_algorithm_names(config):
            return OrderedCompositeBuilder(config, should_init)
        return original(config, should_init)

    return create_compression_algorithm_builder


def check_registered(config: NNCFConfig) -> None:
    """Raise where a section needs what is not registered with ``config``; before any section has run.

    Raises:
        CalibrationError: a loader or an evaluation function is missing.
    """
    check_needs(sections(config), registered(config), how=REGISTERED)


def check_against_model(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise where a ``sigmab`` section cannot belong to ``model``.

    Raises:
        ConfigError: a level is no module of the model, or the scopes leave out a level.
    """
    entries = sections(config)
    if any(
        isinstance(entry.technique, Technique) and entry.algorithm == SigmaBConfig.algorithm
        for entry in entries
    ):
        check(config)
        check_levels(entries, model, config)
