"""Least-squares repair of sliced layers, for ``repair="least_squares"``; not part of the paper.

A layer that lost input channels no longer gives what it gave. Its weights are fitted anew, so that from the inputs
that it gets in the restructured network, on samples of its own branch, it comes as near as it can to the dense
layer's outputs on the same samples (channel pruning by reconstruction: He et al., arXiv 1707.06168). Layers are
fitted in order of execution, each on what the fitted ones before it give, so that errors do not add up. No labels
are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..channels import Slices
from ..tuning.distributed import all_gather_rows, rank, world_size
from ..tuning.seeding import preserve_random_state
from .calibration import Calibration
from .modality import Modality, features
from .segments import Segments, call

_log = logging.getLogger(__name__)

#: Rows of one regression at most; a convolution has a row per sample and position.
_ROWS = 32768
#: Positions of a feature map per sample at most: neighbours tell little that is new.
_POSITIONS = 64
#: Pulls towards the copied weights to choose from, as shares of the mean squared input.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
#: One row in so many is held out to choose among them.
_HELD_OUT = 5
#: Samples whose patches are laid out at a time.
_CHUNK = 64


@dataclass(frozen=True)
class Pair:
    """Frontiers of the same samples: in the dense network, and in the restructured one."""

    dense: Any
    own: Any

    def take(self, kind: Modality, index: Tensor) -> Pair:
        dense = kind.take(self.dense, index)
        return Pair(dense, dense if self.own is self.dense else kind.take(self.own, index))


def sample_pairs(
    segments: Segments, kind: Modality, calibration: Calibration, *, limit: int, count: int
) -> Pair:
    """The backbone's output for ``limit`` calibration samples of all ranks, drawn at random, in random order.

    Args:
        count: samples that this rank's calibration data holds.
    """
    counts = all_gather_rows(torch.tensor([count]))
    start, total = int(counts[: rank()].sum()), int(counts.sum())
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:limit]
    mine = drawn[(drawn >= start) & (drawn < start + count)].sort().values - start
    parts: list[Any] = []
    seen = 0
    for inputs in calibration.batches():
        frontier = segments.enter(inputs)
        size = kind.size(frontier)
        rows = mine[(mine >= seen) & (mine < seen + size)] - seen
        parts.append(kind.take(frontier, rows.to(features(frontier).device)))
        seen += size
    frontier = kind.join(parts)
    parts.clear()
    # Gathered in rank order, which is ascending; ``drawn`` says where each sample belongs.
    frontier = _of_all_ranks(kind, frontier)
    frontier = kind.take(frontier, drawn.argsort().argsort().to(features(frontier).device))
    return Pair(frontier, frontier)


def fit_layers(dense: nn.Module, own: nn.Module, slices: Slices, pair: Pair) -> Pair:
    """Fit, in place, the layers of ``own`` that lost input channels; returns the outputs of both modules.

    Linear layers and convolutions without groups are fitted; other layers stay as they were copied.

    Args:
        dense: the module that ``own`` was sliced from, in eval mode.
        slices: what ``own`` keeps of each of ``dense``'s tensors.
        pair: inputs of both; samples in random order.
    """
    fits = {
        name: _Fit(layer, slices[f"{name}.weight"].get(0))
        for name, layer in own.named_modules()
        if 1 in slices.get(f"{name}.weight", {})
    }
    with torch.no_grad(), preserve_random_state():
        record = [dense.get_submodule(name).register_forward_hook(fit.record) for name, fit in fits.items()]
        wanted = _run(dense, pair.dense, record)
        solve = [own.get_submodule(name).register_forward_pre_hook(fit.solve) for name, fit in fits.items()]
        found = _run(own, pair.own, solve)
    left = [name for name, fit in fits.items() if not fit.done]
    if left:
        _log.info("not repaired, weights stay as copied: %s", ", ".join(left))
    return Pair(wanted, found)


def _run(module: nn.Module, inputs: Any, hooks: Iterable[RemovableHandle]) -> Any:
    """The module's outputs; ``hooks`` end with it. What it draws (a sampling's first point) is as in other runs."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        return call(module, inputs)


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
        if self._rows is None or self._targets is None or self._calls != 1 or not inputs:
            return
        x = self._rows.inputs(layer, inputs[0])
        y, self._targets = self._targets, None
        if len(x) != len(y):
            return
        found = regress(x, y, layer.weight.detach().flatten(1), bias=layer.bias is not None)
        if found is None:
            return
        weight, bias = found
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(bias)
        self.done = True


def regress(x: Tensor, y: Tensor, copied: Tensor, *, bias: bool) -> tuple[Tensor, Tensor] | None:
    """Least squares of ``y`` on ``x`` with a pull towards ``copied``, as strong as rows held out want it.

    Where no pull makes the held-out rows better than the copied weights do, these stay, with a fitted bias.

    Args:
        x: (N, inputs), rows in random order.
        y: (N, outputs).
        copied: (outputs, inputs).
        bias: fit an offset, too, which is not pulled.

    Returns:
        Weights (outputs, inputs) and offset (outputs,) in float64; None where the inputs are all zero or not finite.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y, copied = x.to(wide), y.to(wide), copied.double()
    mean_x, mean_y = (x.mean(dim=0), y.mean(dim=0)) if bias else (x.new_zeros(x.shape[1]), y.new_zeros(1))
    x, y = x - mean_x, y - mean_y
    held = len(x) // _HELD_OUT
    fitted_on, held_out = (
        ((px.T @ px).double(), (py.T @ px).double())
        for px, py in ((x[held:], y[held:]), (x[:held], y[:held]))
    )
    everything = (fitted_on[0] + held_out[0], fitted_on[1] + held_out[1])
    if not all(bool(torch.isfinite(part).all()) for part in everything) or not bool(everything[0].any()):
        return None

    def fit(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
        pull = ridge * gram.diagonal().mean()
        pulled = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        moved: Tensor = torch.linalg.solve(pulled, (cross - copied @ gram).T).T
        return copied + moved

    def error(weight: Tensor) -> float:  # up to what does not depend on the weights
        gram, cross = held_out
        return float(((weight @ gram - 2 * cross) * weight).sum())

    weight, best = copied, error(copied)
    if bool(fitted_on[0].any()):
        errors = {ridge: error(fit(*fitted_on, ridge)) for ridge in _RIDGES}
        ridge = min(errors, key=lambda r: errors[r])
        if errors[ridge] < best:
            weight = fit(*everything, ridge)
    return weight, mean_y.double() - weight @ mean_x.double()


class _Rows:
    """Linear layers: every vector is a row; some of many, at random."""

    def outputs(self, output: Tensor) -> Tensor:
        return _some(output.flatten(0, -2))

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        return _some(x.flatten(0, -2))


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
        return _some(_at(columns, self._positions))

    def inputs(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert self._positions is not None
        chunks = zip(x.split(_CHUNK), self._positions.split(_CHUNK), strict=True)
        return _some(torch.cat([_at(_unfolded(layer, some), positions) for some, positions in chunks]))


def _some(rows: Tensor) -> Tensor:
    if len(rows) <= _ROWS:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_ROWS]
    return rows.index_select(0, chosen.sort().values.to(rows.device))


def _at(columns: Tensor, positions: Tensor) -> Tensor:
    """(B, C, L) at (B, n) of its positions: (B n, C)."""
    index = positions.unsqueeze(1).expand(-1, columns.shape[1], -1)
    return columns.gather(2, index).transpose(1, 2).flatten(0, 1)


def _unfolded(layer: Any, x: Tensor) -> Tensor:
    """Patches that a convolution over one or two dimensions reads: (B, C * kernel, positions)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    size, step, dilation = layer.kernel_size, layer.stride, layer.dilation
    if x.ndim == 3:
        x, size, step, dilation = x.unsqueeze(2), (1, *size), (1, *step), (1, *dilation)
    return F.unfold(x, size, dilation=dilation, stride=step)


def _rows_of(layer: Any) -> _Rows | None:
    """How the layer's inputs and outputs become rows of a regression; None: it cannot be fitted.

    A subclass that computes something else with its weight (standardised weights, cosines) is none of these.
    """
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return None
    kind = type(layer)
    for stock in (nn.Conv1d, nn.Conv2d):
        if isinstance(layer, stock) and kind.forward is stock.forward:
            own = kind._conv_forward is not stock._conv_forward
            return None if own or layer.groups != 1 else _Patches()
    of_geometric = (kind.__module__, kind.__name__) == ("torch_geometric.nn.dense.linear", "Linear")
    return _Rows() if kind.forward is nn.Linear.forward or of_geometric else None


def _of_all_ranks(kind: Modality, frontier: Any) -> Any:
    """The samples of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return frontier
    if not isinstance(frontier, (tuple, list)):
        return all_gather_rows(frontier)
    values = list(frontier)
    if kind.name == "points":
        sizes = all_gather_rows(torch.tensor([kind.size(frontier)]))
        values[2] = values[2] + int(sizes[: rank()].sum())
    return tuple(all_gather_rows(value) if torch.is_tensor(value) else value for value in values)
