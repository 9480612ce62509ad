"""What a throw-away copy of a tail needs before the DependencyGraph can follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

#: Layers that step through a sequence. Their gates share weights in ways that no index mapping describes.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@contextmanager
def traceable(modules: nn.Module) -> Iterator[None]:
    """Prepare a throw-away copy: gradients on, eval mode, PyG's Linear as an nn.Linear, recurrent layers as one
    operation, and weights that are computed from others as leaves.
    """
    modules.eval()
    for parameter in modules.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    for module in modules.modules():
        for parameter in _sources(module):
            parameter.requires_grad_(False)
        if isinstance(module, RECURRENT):
            _make_opaque(module)
        if (
            f"{type(module).__module__}.{type(module).__qualname__}"
            == "torch_geometric.nn.dense.linear.Linear"
        ):
            module.__class__ = _pyg_linear_class(type(module))
    with torch.enable_grad():
        yield


def recurrent_pruners(tp: Any, modules: nn.Module) -> dict[type[nn.Module], Any]:
    """What the DependencyGraph is told of each recurrent layer class in ``modules``: its widths alone.

    Torch-Pruning knows nn.LSTM only, and takes a bidirectional one for half as wide as it is.
    """
    base = tp.pruner.function.BasePruningFunc if hasattr(tp.pruner, "function") else tp.BasePruningFunc

    class RecurrentPruner(base):  # type: ignore[misc, valid-type]
        def prune_out_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            raise RuntimeError("recurrent layers keep their channels")

        def prune_in_channels(self, layer: nn.Module, idxs: list[int]) -> nn.Module:
            raise RuntimeError("recurrent layers keep their channels")

        def get_out_channels(self, layer: Any) -> int:
            width = getattr(layer, "proj_size", 0) or layer.hidden_size
            return int(width) * (2 if getattr(layer, "bidirectional", False) else 1)

        def get_in_channels(self, layer: Any) -> int:
            return int(layer.input_size)

    pruner = RecurrentPruner()
    return {type(module): pruner for module in modules.modules() if isinstance(module, RECURRENT)}


def _sources(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters from which the layer computes another of its tensors before it runs.

    They index nothing that a group holds, so the graph need not know them.
    """
    if parametrize.is_parametrized(module):
        yield from module.get_submodule("parametrizations").parameters()
    # weight_norm, spectral_norm and torch.nn.utils.prune leave the computed tensor as a plain attribute.
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            for suffix in ("_g", "_v", "_orig"):
                parameter = getattr(module, name + suffix, None)
                if isinstance(parameter, nn.Parameter):
                    yield parameter


class _Opaque(torch.autograd.Function):
    """One node of the graph from all of a layer's inputs to all of its outputs."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], tuple[torch.Tensor, ...]], *inputs: Any) -> Any:
        return compute()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("opaque layers exist while tracing only")


def _make_opaque(layer: nn.Module) -> None:
    """Run ``layer`` as one operation: outputs and last states all lead to it, and nothing inside it is seen."""
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []

        def run() -> tuple[torch.Tensor, ...]:
            results.append(compute(*args, **kwargs))
            return tuple(_floats(results[0]))

        outputs = iter(_Opaque.apply(run, *_floats([args, list(kwargs.values())])))
        return _with_floats(results[0], outputs)

    layer.forward = forward  # type: ignore[method-assign]


def _floats(value: Any) -> Iterator[torch.Tensor]:
    """Floating-point tensors of nested tuples, packed sequences among them."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _floats(item)


def _with_floats(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """``value`` with its floating-point tensors replaced in order."""
    if isinstance(value, torch.Tensor):
        return next(tensors) if value.is_floating_point() else value
    if isinstance(value, tuple):
        items = [_with_floats(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


_pyg_linear_classes: dict[type, type] = {}


def _pyg_linear_class(kind: type) -> type:
    """A subclass of PyG's Linear that Torch-Pruning takes for the nn.Linear that it is in effect."""
    if kind not in _pyg_linear_classes:
        _pyg_linear_classes[kind] = type(
            "TraceableLinear",
            (kind, nn.Linear),
            {
                "__module__": __name__,
                "in_features": property(lambda self: self.in_channels),
                "out_features": property(lambda self: self.out_channels),
            },
        )
    return _pyg_linear_classes[kind]
