"""Parameters and multiply-accumulates, counted the same way for every network of the project."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameter_count(*modules: nn.Module) -> int:
    """Number of parameters in ``modules`` together; a shared parameter counts once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def storage_bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers in ``modules`` together; shared tensors count once."""
    return sum(t.numel() * t.element_size() for t in unique_tensors(modules))


def unique_tensors(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            seen[id(tensor)] = tensor
    return list(seen.values())


def as_arguments(inputs: Any) -> tuple[Any, ...]:
    """A tuple or list is a call's positional arguments; anything else is one argument."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def macs(module: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of ``module`` on ``inputs``: convolutions and matrix products, batch included.

    A tuple or list of inputs is splatted, a dict is keywords.
    Element-wise work and normalisation are not counted (the convention of the published figures).
    Runs a copy in eval mode, so that neither mode nor buffers change.
    """
    runnable = copy.deepcopy(module).eval()
    arguments, named = ((), inputs) if isinstance(inputs, dict) else (as_arguments(inputs), {})
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent_layer}
    )
    with torch.no_grad(), _products_seen(runnable), counter:
        runnable(*arguments, **named)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _products_seen(module: nn.Module) -> Iterator[None]:
    """Attention and recurrent layers as plain matrix products: torch's counter gives their fused forms zero."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as settings:
            settings.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(isinstance(part, nn.RNNBase) for part in module.modules()):
                settings.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _recurrent_layer(
    steps: torch.Size, of_inputs: torch.Size, of_state: torch.Size, *rest: Any, **named: Any
) -> int:
    """Operations of oneDNN's LSTM and GRU, which has no form of matrix products; from the shapes of its arguments."""
    return 2 * steps[0] * steps[1] * (math.prod(of_inputs) + math.prod(of_state))
