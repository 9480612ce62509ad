"""How much each weight matters: magnitude, gradient, SNIP and GraSP. Larger is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import CalibrationError, ModelError
from ..supervised import LossFunction, differentiable_copy, module_device, supervised_batches, training_loss
from .roles import LayerWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sensitivity:
    """Weights and derivatives of the loss on the calibration data, by parameter name, on the CPU.

    Attributes:
        weights: w.
        gradients: g = dL/dw, mean over batches.
        hessian_gradients: H g, for GraSP; empty where it is not asked for.
    """

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    hessian_gradients: dict[str, Tensor]

    def importance(self, kind: str, name: str) -> Tensor:
        """Importance of every weight of ``name``, in its shape.

        ``magnitude`` |w|; ``gradient`` |g|; ``combined`` and ``snip`` |w g| (Lee et al. 2019);
        ``grasp`` w . H g: GraSP (Wang et al. 2020, eq. 8) removes the weights with the largest -w . H g.
        """
        weight = self.weights[name]
        if kind == "magnitude":
            return weight.abs()
        if kind == "gradient":
            return self.gradients[name].abs()
        if kind == "grasp":
            return weight * self.hessian_gradients[name]
        return (weight * self.gradients[name]).abs()


def measure_sensitivity(
    model: nn.Module,
    layers: Sequence[LayerWeight],
    calibration_data: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    hessian: bool = True,
) -> Sensitivity:
    """Differentiate the loss of a copy of ``model`` in eval mode (running statistics, no dropout).

    GraSP was stated for random initial weights and training mode; here the network is trained, and its
    deployed function is what is differentiated. Attention runs without fused kernels, which have no
    second derivative.

    Raises:
        CalibrationError: no batch, no targets, or a loss or gradient that is not finite.
        ModelError: an operation without second derivative, or without a finite one, with ``hessian``.
    """
    working = differentiable_copy(model)
    device = module_device(working)
    names = [layer.name for layer in layers]
    parameters = dict(working.named_parameters(remove_duplicate=False))
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    chosen = [parameters[name].requires_grad_(True) for name in names]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        gradients = [torch.zeros_like(parameter) for parameter in chosen]
        batches = 0
        for inputs, targets in supervised_batches(calibration_data, device, name="calibration data"):
            loss = training_loss(working, inputs, targets, loss_fn)
            if not torch.isfinite(loss):
                raise CalibrationError(
                    "the loss on the calibration data is not finite; check inputs and targets"
                )
            for total, part in zip(gradients, _gradients(loss, chosen), strict=True):
                total += part
            batches += 1
        gradients = [total / batches for total in gradients]
        for name, gradient in zip(names, gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise CalibrationError(
                    f"the gradient of the loss by {name!r} is not finite on the calibration data; look for a root or a "
                    "logarithm of 0, or name the layer in ignored_layers"
                )
        products: list[Tensor] = []
        if hessian:
            products = [torch.zeros_like(parameter) for parameter in chosen]
            for inputs, targets in supervised_batches(calibration_data, device, name="calibration data"):
                loss = training_loss(working, inputs, targets, loss_fn)
                for total, part in zip(products, _hessian_product(loss, chosen, gradients), strict=True):
                    total += part / batches
            for name, product in zip(names, products, strict=True):
                if not torch.isfinite(product).all():
                    raise ModelError(
                        f"the second derivatives of the loss by {name!r} are not finite on the calibration data; "
                        "leave 'grasp' out of criteria"
                    )
    return Sensitivity(
        weights={n: p.detach().cpu() for n, p in zip(names, chosen, strict=True)},
        gradients={n: g.cpu() for n, g in zip(names, gradients, strict=True)},
        hessian_gradients={n: h.cpu() for n, h in zip(names, products, strict=False)},
    )


def _gradients(loss: Tensor, parameters: Sequence[Tensor], *, graph: bool = False) -> list[Tensor]:
    parts = torch.autograd.grad(loss, parameters, create_graph=graph, allow_unused=True)
    return [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]


def _hessian_product(loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v by differentiating g . v."""
    first = _gradients(loss, parameters, graph=True)
    inner = torch.stack([(part * v).sum() for part, v in zip(first, vector, strict=True)]).sum()
    if not inner.requires_grad:  # the loss is linear in every weight
        return [torch.zeros_like(parameter) for parameter in parameters]
    try:
        return [part.detach() for part in _gradients(inner, parameters)]
    except RuntimeError as error:
        raise ModelError(
            f"GraSP needs second derivatives, which the model does not have ({error}); "
            "leave 'grasp' out of criteria"
        ) from error
