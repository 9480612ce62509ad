"""torch.export artefacts: a program that takes the weights as inputs. JSON and raw bytes, nothing pickled."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle import Artefact, Options
from ..nodes import NodeSource
from ..onnx_graph import dynamic_shapes, export_failure
from ..quantization import too_large_for_half
from ..writing import raw

LIBRARIES = ()


class _OverWeights(nn.Module):
    """``source``'s module as a function of its weights; 16-bit weights are widened before use."""

    _body: nn.Module

    def __init__(self, source: NodeSource) -> None:
        super().__init__()
        # Not registered: the weights shall be inputs of the program, not part of it.
        object.__setattr__(self, "_body", source.module)
        tensors = {**dict(source.module.named_parameters()), **dict(source.module.named_buffers())}
        # The batch counter of BatchNorm matters in training only.
        self.tensors = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}

    def forward(self, weights: list[Tensor], *inputs: Tensor) -> Any:
        values = {
            name: weight.to(original.dtype)
            for (name, original), weight in zip(self.tensors.items(), weights, strict=True)
        }
        return torch.func.functional_call(self._body, values, inputs)


def export_artefact(source: NodeSource, options: Options) -> Artefact:
    module = _OverWeights(source)
    half = _halves(source, module.tensors) if options.precision == "fp16" else frozenset()
    weights = [t.detach().half() if name in half else t.detach() for name, t in module.tensors.items()]
    fixed: list[Any] = [None] * len(weights)
    try:
        program = torch.export.export(
            module,
            (weights, *source.example),
            dynamic_shapes=(fixed, dynamic_shapes(source, options.modality)),
        )
    except Exception as error:  # torch.export raises many kinds; all of them mean the same to the caller
        raise export_failure(source, "torch.export", error, traced=False) from error
    # Examples would be stored with the program: the weights once more, and pickled.
    program._example_inputs = None  # type: ignore[assignment]
    data = io.BytesIO()
    torch.export.save(program, data)
    tensors = [raw(name, w.cpu().numpy()) for name, w in zip(module.tensors, weights, strict=True)]
    return Artefact(data.getvalue(), ".pt2", tensors)


def _halves(source: NodeSource, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """Which tensors are stored in 16 bits: not the router's, running statistics, or what does not fit."""
    candidates = {
        name: t.detach().cpu().numpy()
        for name, t in tensors.items()
        if t.dtype == torch.float32
        and not name.endswith(("running_mean", "running_var"))
        and not (source.role != "leaf" and name.startswith("router."))
    }
    return frozenset(candidates.keys() - too_large_for_half(source, candidates))


def requires(options: Options) -> dict[str, Any]:
    """Torch reads programs of its own and earlier versions."""
    return {"torch": torch.__version__.split("+")[0]}
