"""Ranges and BatchNorm statistics of a tree in NNCF 2.x, where a leaf may get few of the samples, or none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from nncf.torch.quantization.algo import QuantizationBuilder
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modes import evaluating
from ..tree.net import SigmaBNet
from ..tree.segments import call
from .nncf_v2_data import LoaderBatches

_log = logging.getLogger(__name__)
#: A leaf with fewer samples than this for its ranges takes them from all samples.
_FEWEST = 2


@contextmanager
def ranges_for_every_leaf(model: Any, builder: Any) -> Iterator[None]:
    """Around the planning of ``builder`` on ``model``, in which NNCF collects the ranges of quantizers.

    Ranges are collected in hard routing, each leaf's on the samples that it will see. Where that would leave a leaf
    with fewer than two, all of them are collected in soft routing, where every leaf sees every sample.
    """
    params = (
        getattr(builder, "_range_init_params", None) if isinstance(builder, QuantizationBuilder) else None
    )
    if not isinstance(model, SigmaBNet) or params is None or not builder.should_init:
        yield
        return
    device = params.device or next(model.parameters()).device
    counts = _samples_per_leaf(model, LoaderBatches(params.init_range_data_loader, device), params)
    few = [f"{leaf} ({count})" for leaf, count in zip(model.leaves, counts, strict=True) if count < _FEWEST]
    before = model.routing
    if few:
        _log.warning(
            "quantization: of %d samples for the quantizers' ranges, too few reach %s; every leaf takes its ranges "
            "from all of them. With more num_init_samples each leaf takes them from its own",
            sum(counts),
            ", ".join(few),
        )
        model.routing = "soft"
    try:
        yield
    finally:
        model.routing = before


def _samples_per_leaf(model: Any, batches: LoaderBatches, params: Any) -> list[int]:
    counts = [0] * len(model.leaves)
    with evaluating(model):
        for inputs, _ in islice(iter(batches), params.get_max_num_init_steps()):
            for index in call(model.route, inputs).tolist():
                counts[index] += 1
    return counts


@contextmanager
def lone_samples_normalised(model: Any) -> Iterator[None]:
    """Around NNCF's adaptation of BatchNorm, in which hard routing may send one sample of a batch to a leaf.

    One value per channel has no variance: such a batch is normalised by the running statistics, and leaves them as
    they are, instead of ending the adaptation.
    """
    if not isinstance(model, SigmaBNet):
        yield
        return
    lone: set[nn.Module] = set()

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        values = arguments[0]
        if module.training and values.numel() == values.shape[1]:
            lone.add(module)
            module.training = False

    def after(module: nn.Module, arguments: Any, output: Any) -> None:
        if module in lone:
            lone.discard(module)
            module.training = True

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                hooks.callback(module.register_forward_pre_hook(before).remove)
                hooks.callback(module.register_forward_hook(after).remove)
        yield
