"""What packing cost and what it saved, in real bytes."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from .bits import bits_per_index
from .packed import PackedModel
from .storage import save_packed


@dataclass(frozen=True)
class PackingReport:
    """Sizes in bytes of whole files, headers included; errors relative to the weights' energy.

    Attributes:
        dense_bytes: the dense state dict as a safetensors file.
        packed_bytes: the packed model's file.
        ratio: dense / packed, the compression that is real.
        index_ratio: dense bits / index bits of the packed weights alone, the figure that is published.
        bits_per_weight: index bits per packed weight, padding counted.
        packed_share: share of the model's parameters that is packed.
        relative_error: sum of (w - w')^2 / sum of w^2 over packed weights.
        gaussian_floor: 2^(-2R) at R = ``bits_per_weight``, the least relative error that any code of that
            rate reaches on independent Gaussian weights of equal variance.
        layer_errors: relative error of each packed tensor.
    """

    codebook_size: int
    dense_bytes: int
    packed_bytes: int
    ratio: float
    index_ratio: float
    bits_per_weight: float
    packed_share: float
    relative_error: float
    gaussian_floor: float
    layer_errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"K = {self.codebook_size}: {self.dense_bytes} -> {self.packed_bytes} bytes, {self.ratio:.1f}x on disk "
            f"({self.index_ratio:.1f}x counting indices only), {self.bits_per_weight:.3f} bit per weight, "
            f"weight error {self.relative_error:.3f} (Gaussian floor {self.gaussian_floor:.3f})"
        )


def gaussian_floor(bits_per_weight: float) -> float:
    """Rate-distortion bound of a Gaussian source: relative squared error at R bits per weight."""
    return float(2.0 ** (-2.0 * bits_per_weight))


def measure(packed: PackedModel, model: nn.Module) -> PackingReport:
    """Compare ``packed`` with the dense ``model`` it was made from."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    stored = {name: t.contiguous().clone() for name, t in state.items() if name not in packed.aliases}
    with tempfile.TemporaryDirectory() as folder:
        packed_bytes = save_packed(packed, Path(folder) / "packed.safetensors")
    bits = bits_per_index(len(packed.codebook))
    weights = index_bits = dense_bits = 0
    error = energy = 0.0
    layer_errors: dict[str, float] = {}
    for name, entry in packed.tensors.items():
        weight = state[name].to(torch.float64)
        expanded = entry.expand(packed.codebook, packed.config.block_size).to(torch.float64)
        layer_error, layer_energy = float((weight - expanded).square().sum()), float(weight.square().sum())
        layer_errors[name] = layer_error / layer_energy if layer_energy else 0.0
        error, energy = error + layer_error, energy + layer_energy
        weights += weight.numel()
        index_bits += len(entry.indices(packed.config.block_size, len(packed.codebook))) * bits
        dense_bits += weight.numel() * state[name].element_size() * 8
    dense_bytes = len(save(stored))
    rate = index_bits / weights
    return PackingReport(
        codebook_size=len(packed.codebook),
        dense_bytes=dense_bytes,
        packed_bytes=packed_bytes,
        ratio=dense_bytes / packed_bytes,
        index_ratio=dense_bits / index_bits if index_bits else float("inf"),
        bits_per_weight=rate,
        packed_share=weights / sum(p.numel() for p in model.parameters()),
        relative_error=error / energy if energy else 0.0,
        gaussian_floor=gaussian_floor(rate),
        layer_errors=layer_errors,
    )
