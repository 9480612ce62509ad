"""NNCF 2.x controllers of the techniques: loss, scheduler, statistics, strip, export, state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from nncf.api.compression import CompressionStage
from nncf.api.statistics import Statistics
from nncf.common.schedulers import BaseCompressionScheduler
from nncf.common.statistics import NNCFStatistics
from nncf.torch.algo_selector import ZeroCompressionLoss
from nncf.torch.composite_compression import PTCompositeCompressionAlgorithmController
from nncf.torch.compression_method_api import PTCompressionAlgorithmController, PTCompressionLoss
from nncf.torch.nncf_network import NNCFNetwork
from nncf.torch.quantization.algo import QuantizationController
from nncf.torch.quantization.layers import QuantizerExportMode
from torch import Tensor

from ..config import SigmaBConfig, TechniqueConfig
from ..errors import TrainingError
from ..tree.net import ParameterCounts
from ..tuning.losses import responsibilities, responsibility_loss
from .nncf_v2_statistics import FinishedStatistics, ParameterStatistics, TechniqueStatistics, TreeStatistics


class TreeLoss(PTCompressionLoss):
    """Eq. 8 without the task term: what must be added to the cross-entropy of the net's output.

    In soft routing the output is o = sum_k p_k y_k, and the user computes CE(o, y). Eq. 5 asks for
    sum_k p_k CE(y_k, y). Their difference does not depend on y::

        sum_k p_k CE(y_k, y) - CE(o, y) = sum_k p_k lse(y_k) - lse(o)  >= 0     (lse = log-sum-exp over classes)

    and label smoothing leaves it as it is. The responsibility term (eq. 7) needs y: it is taken from the first
    cross-entropy that is computed on the output, or given as ``ctrl.loss(targets)``.
    """

    def __init__(self, network: NNCFNetwork, config: SigmaBConfig) -> None:
        super().__init__()
        self._network = (network,)  # a tuple: the network must not become a submodule of its own loss
        self._weight = config.responsibility_weight
        self._temperature = config.responsibility_temperature

    def forward(self, targets: Tensor | None = None) -> Tensor:
        return self.calculate(targets)

    def calculate(self, targets: Tensor | None = None) -> Tensor:
        """Scalar; 0 where no training forward has run since the last call.

        Raises:
            TrainingError: the task loss has not been computed yet, so that the targets are not known.
        """
        step = self._network[0].__dict__.pop("last_step", None)
        if step is None:
            return torch.zeros([], device=next(self._network[0].parameters()).device)
        leaf_logits, log_p = step.leaf_logits.float(), step.log_p.float()
        weights = log_p.exp()
        mixed = (weights.unsqueeze(2) * leaf_logits).sum(dim=1)
        gap = (weights * leaf_logits.logsumexp(dim=2)).sum(dim=1) - mixed.logsumexp(dim=1)
        loss = gap.mean()
        if not self._weight:
            return loss
        targets = step.targets if targets is None else targets
        if targets is None:
            raise TrainingError(
                "the responsibility term needs the targets. Compute the task loss on the model's output first "
                "(torch.nn.functional.cross_entropy or CrossEntropyLoss), or call ctrl.loss(targets)."
            )
        responsibility = responsibilities(leaf_logits, targets, temperature=self._temperature)
        return loss + self._weight * responsibility_loss(responsibility, log_p)


class SettledController(PTCompressionAlgorithmController):
    """Controller of what has done its work when the network is built: no loss, nothing to schedule."""

    def __init__(self, target_model: NNCFNetwork) -> None:
        super().__init__(target_model)
        self._loss: PTCompressionLoss = ZeroCompressionLoss(next(target_model.parameters()).device)
        self._scheduler = BaseCompressionScheduler()

    @property
    def loss(self) -> PTCompressionLoss:
        return self._loss

    @property
    def scheduler(self) -> Any:
        return self._scheduler

    def compression_stage(self) -> CompressionStage:
        return CompressionStage.FULLY_COMPRESSED

    def statistics(self, quickly_collected_only: bool = False) -> NNCFStatistics:
        name, statistics = self._table()
        result = TechniqueStatistics()
        result.register(name, statistics)
        return result

    def _table(self) -> tuple[str, Statistics]:
        raise NotImplementedError


class _ExportingController(SettledController):
    def export_model(self, *args: Any, **kwargs: Any) -> None:
        """As NNCF's; a tree's file answers as hard routing does, with every leaf in one static graph."""
        with selected_forward(self.model):
            super().export_model(*args, **kwargs)


class TechniqueController(_ExportingController):
    """Controller of a technique without a loss of its own.

    ``line`` and ``facts`` say what the technique did, see :func:`.nncf_outcome.outcome`.
    """

    def __init__(
        self, target_model: NNCFNetwork, config: TechniqueConfig, line: str, facts: Mapping[str, Any]
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self.line, self.facts = line, facts

    def _table(self) -> tuple[str, Statistics]:
        name = self.config.algorithm
        return name, ParameterStatistics(name, self.line, self.facts)


class TreeController(_ExportingController):
    """Controller of ``sigmab``."""

    def __init__(
        self,
        target_model: NNCFNetwork,
        config: SigmaBConfig,
        *,
        dense_parameters: int,
        counts: ParameterCounts,
    ) -> None:
        super().__init__(target_model)
        self.config = config
        self.dense_parameters, self.counts = dense_parameters, counts
        self._loss = TreeLoss(target_model, config)

    def _table(self) -> tuple[str, Statistics]:
        return self.config.algorithm, TreeStatistics(self.counts, self.dense_parameters)

    @property
    def compression_rate(self) -> float:
        """Share of the dense network's parameters that one input does not touch."""
        return 1.0 - float(self.counts.active) / self.dense_parameters


class FinishedController(SettledController):
    """Controller of an algorithm that was carried out before the restructuring.

    ``done`` is what the builder keeps of it: ``table`` and ``line``, see :class:`FinishedStatistics`.
    """

    def __init__(self, target_model: NNCFNetwork, done: Mapping[str, str]) -> None:
        super().__init__(target_model)
        self._done = done

    def _table(self) -> tuple[str, Statistics]:
        return self.name, FinishedStatistics(self.name, self._done["table"], self._done["line"])


class OrderedCompositeController(PTCompositeCompressionAlgorithmController):
    """NNCF's composite, with statistics open to our names and an export that shows every leaf."""

    def __init__(self, target_model: NNCFNetwork, *, standard_operators: bool = True) -> None:
        super().__init__(target_model)
        self.standard_operators = standard_operators

    def statistics(self, quickly_collected_only: bool = False) -> NNCFStatistics:
        result = TechniqueStatistics()
        for controller in self.child_ctrls:
            for name, stats in controller.statistics(quickly_collected_only):
                result.register(name, stats)
        return result

    def export_model(self, *args: Any, **kwargs: Any) -> None:
        """As NNCF's, with two differences.

        The file answers as hard routing does, with every leaf in one static graph. Quantizers become standard
        QuantizeLinear / DequantizeLinear pairs, which ONNX Runtime and OpenVINO both read, unless the section says
        ``"export_to_onnx_standard_ops": false`` (NNCF's own FakeQuantize, which OpenVINO alone reads).
        """
        for controller in self.child_ctrls:
            if isinstance(controller, QuantizationController) and self.standard_operators:
                for quantizer in controller.all_quantizations.values():
                    quantizer.set_export_mode(QuantizerExportMode.ONNX_QUANTIZE_DEQUANTIZE_PAIRS)
        with selected_forward(self.model):
            super().export_model(*args, **kwargs)


@contextmanager
def selected_forward(network: Any) -> Iterator[None]:
    """Inside, ``network`` computes every leaf and picks the routed one: what an exporter can trace.

    NNCF's quantizers are exported by TorchScript symbols, which torch no longer uses unless told; NNCF before 2.19
    does not tell it.
    """
    forward = getattr(network, "forward_selected", None)
    export = torch.onnx.export

    def torchscript_export(*args: Any, **kwargs: Any) -> Any:
        return export(*args, **{"dynamo": False, **kwargs})

    torch.onnx.export = torchscript_export  # type: ignore[assignment]
    try:
        with network.nncf.temporary_bound_original_forward(forward) if forward is not None else nullcontext():
            yield
    finally:
        torch.onnx.export = export  # type: ignore[assignment]
