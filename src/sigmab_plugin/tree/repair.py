"""Least-squares repair of sliced layers, for ``repair="least_squares"``; not part of the paper.

A layer that lost input channels no longer gives what it gave. Its weights are fitted anew, so that from the inputs
that it gets in the restructured network, on samples of its own branch, it comes as near as it can to the dense
layer's outputs on the same samples (channel pruning by reconstruction: He et al., arXiv 1707.06168). Layers are
fitted in order of execution, each on what the fitted ones before it give, so that errors do not add up. No labels
are needed.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..channels import Slices
from ..tuning.distributed import all_gather_rows, rank
from .calibration import Calibration
from .modality import Modality, features
from .segments import Segments, call

_log = logging.getLogger(__name__)

#: Rows of one regression at most; a convolution has a row per sample and position.
_ROWS = 32768
#: Positions of a feature map per sample at most: neighbours tell little that is new.
_POSITIONS = 64
#: Pull towards the copied weights, as a share of the mean squared input.
_RIDGE = 1e-3
#: Samples whose patches are laid out at a time.
_CHUNK = 64


@dataclass(frozen=True)
class Pair:
    """Frontiers of the same samples: in the dense network, and in the restructured one."""

    dense: Any
    own: Any

    def take(self, kind: Modality, index: Tensor) -> Pair:
        return Pair(kind.take(self.dense, index), kind.take(self.own, index))


def sample_pairs(
    segments: Segments, kind: Modality, calibration: Calibration, *, limit: int, total: int
) -> Pair:
    """The backbone's output for at most ``limit`` of ``total`` samples (over all ranks), evenly spaced."""
    stride = -(-total // limit)
    parts: list[Any] = []
    seen = 0
    for inputs in calibration.batches():
        frontier = call(segments.backbone, inputs)
        size = kind.size(frontier)
        rows = torch.arange(-seen % stride, size, stride, device=features(frontier).device)
        parts.append(kind.take(frontier, rows))
        seen += size
    frontier = _of_all_ranks(kind, kind.join(parts))
    return Pair(frontier, frontier)


def fit_layers(dense: nn.Module, own: nn.Module, slices: Slices, pair: Pair) -> Pair:
    """Fit, in place, the layers of ``own`` that lost input channels; returns the outputs of both modules.

    Linear layers and convolutions without groups are fitted; other layers stay as they were copied.

    Args:
        dense: the module that ``own`` was sliced from, in eval mode.
        slices: what ``own`` keeps of each of ``dense``'s tensors.
        pair: inputs of both.
    """
    fits = {
        name: _Fit(layer, slices[f"{name}.weight"].get(0))
        for name, layer in own.named_modules()
        if 1 in slices.get(f"{name}.weight", {})
    }
    with torch.no_grad():
        with ExitStack() as hooks:
            for name, fit in fits.items():
                hooks.callback(dense.get_submodule(name).register_forward_hook(fit.record).remove)
            wanted = call(dense, pair.dense)
        with ExitStack() as hooks:
            for name, fit in fits.items():
                hooks.callback(own.get_submodule(name).register_forward_pre_hook(fit.solve).remove)
            found = call(own, pair.own)
    left = [name for name, fit in fits.items() if not fit.done]
    if left:
        _log.info("not repaired, weights stay as copied: %s", ", ".join(left))
    return Pair(wanted, found)


class _Fit:
    """One layer: what the dense layer gives, recorded, and the regression once the sliced one gets its input."""

    def __init__(self, layer: nn.Module, kept: Tensor | None) -> None:
        self.done = False
        self._kept = kept
        self._rows = _rows_of(layer)
        self._targets: Tensor | None = None
        self._calls = 0

    def record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._calls += 1
        if self._rows is None or not torch.is_tensor(output):
            return
        rows = self._rows.outputs(output)
        self._targets = rows if self._kept is None else rows.index_select(1, self._kept.to(rows.device))

    def solve(self, layer: Any, inputs: tuple[Any, ...]) -> None:
        # A layer that is called twice has two sets of inputs: one fit would spoil the other.
        if self._targets is None or self._rows is None or self._calls != 1:
            return
        x = self._rows.inputs(layer, inputs[0])
        if len(x) != len(self._targets):
            return
        weight, bias = layer.weight, layer.bias
        fitted = weight.detach().double().flatten(1)
        if bias is not None:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            fitted = torch.cat([fitted, bias.detach().double().unsqueeze(1)], dim=1)
        x, y = x.double(), self._targets.double()
        gram = x.T @ x
        pull = _RIDGE * gram.diagonal().mean()
        if not float(pull):
            return
        gram_with_pull = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        rest = y.T @ x - fitted @ gram
        fitted = fitted + torch.linalg.solve(gram_with_pull, rest.T).T
        if bias is not None:
            bias.copy_(fitted[:, -1])
            fitted = fitted[:, :-1]
        weight.copy_(fitted.reshape(weight.shape))
        self._targets = None
        self.done = True


class _Rows:
    """Linear layers: every vector is a row; a random part of many."""

    def outputs(self, output: Tensor) -> Tensor:
        return self._some(output.flatten(0, -2))

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        return self._some(x.flatten(0, -2))

    @staticmethod
    def _some(rows: Tensor) -> Tensor:
        if len(rows) <= _ROWS:
            return rows
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_ROWS]
        return rows.index_select(0, chosen.sort().values.to(rows.device))


class _Patches(_Rows):
    """Convolutions: a row is the patch at one position; some positions of every sample."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None

    def outputs(self, output: Tensor) -> Tensor:
        columns = output.flatten(2)
        samples, count = columns.shape[0], columns.shape[2]
        wanted = max(1, min(count, _POSITIONS, _ROWS // max(samples, 1)))
        order = torch.rand(samples, count, generator=torch.Generator().manual_seed(0))
        self._positions = order.topk(wanted, dim=1).indices.to(output.device)
        return self._some(self._at(columns, self._positions))

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert self._positions is not None
        rows = []
        for some, positions in zip(x.split(_CHUNK), self._positions.split(_CHUNK), strict=True):
            rows.append(self._at(_unfolded(layer, some), positions))
        return self._some(torch.cat(rows))

    @staticmethod
    def _at(columns: Tensor, positions: Tensor) -> Tensor:
        """(B, C, L) at (B, n) of its positions: (B n, C)."""
        index = positions.unsqueeze(1).expand(-1, columns.shape[1], -1)
        return columns.gather(2, index).transpose(1, 2).flatten(0, 1)


def _unfolded(layer: Any, x: Tensor) -> Tensor:
    """Patches that a convolution over one or two dimensions reads: (B, C * kernel, positions)."""
    if x.ndim == 3:
        size, step, pad, dilation = (
            (1, value[0]) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        return F.unfold(x.unsqueeze(2), size, dilation=dilation, padding=(0, pad[1]), stride=step)
    return F.unfold(x, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)


def _rows_of(layer: Any) -> _Rows | None:
    """How the layer's inputs and outputs become rows of a regression; None: it cannot be fitted."""
    if not isinstance(layer._parameters.get("weight"), nn.Parameter) or not hasattr(layer, "bias"):
        return None
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return _Patches() if plain else None
    # torch-geometric's Linear is no nn.Linear; both hold (out, in).
    linear = isinstance(layer, nn.Linear) or (type(layer).__name__ == "Linear" and layer.weight.ndim == 2)
    return _Rows() if linear else None


def _of_all_ranks(kind: Modality, frontier: Any) -> Any:
    """The samples of all ranks, in rank order, on every rank."""
    if not isinstance(frontier, (tuple, list)):
        return all_gather_rows(frontier)
    values = list(frontier)
    if kind.name == "points":
        sizes = all_gather_rows(torch.tensor([kind.size(frontier)]))
        values[2] = values[2] + int(sizes[: rank()].sum())
    return tuple(all_gather_rows(value) if torch.is_tensor(value) else value for value in values)
