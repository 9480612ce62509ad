"""Accuracy, loss and leaf shares of a network over a loader, as it would be deployed (hard routing)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..counting import as_arguments
from ..errors import TrainingError
from .batches import check_logits, check_shape, check_targets, class_indices, split_batch, to_device
from .distributed import all_reduce_sum
from .objective import is_tree, leaf_names


@dataclass(frozen=True)
class Evaluation:
    """Result over all samples (of all ranks). Per-leaf entries are empty for a plain module.

    Attributes:
        samples: number of samples.
        loss: mean cross-entropy of the routed leaf.
        accuracy: share of correct samples.
        class_accuracy: accuracy by class; NaN for a class without samples.
        leaf_shares: share of samples by leaf, in the order of ``net.leaves``.
        leaf_classes: samples by leaf (rows) and class (columns).
        leaf_correct: those of them that are classified correctly.
    """

    samples: int
    loss: float
    accuracy: float
    class_accuracy: tuple[float, ...]
    leaf_shares: tuple[float, ...] = ()
    leaf_classes: tuple[tuple[int, ...], ...] = ()
    leaf_correct: tuple[tuple[int, ...], ...] = ()

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the accuracies of the classes that have samples."""
        seen = [value for value in self.class_accuracy if not math.isnan(value)]
        return sum(seen) / len(seen)

    @property
    def balance(self) -> float | None:
        """Entropy of the leaf shares / ln(leaves), in [0, 1]; None for a plain module."""
        return balance(self.leaf_shares) if self.leaf_shares else None


def balance(shares: Sequence[float]) -> float:
    """Entropy of ``shares`` / ln(number of shares); 1 for one share alone."""
    if len(shares) < 2:
        return 1.0
    return sum(-share * math.log(share) for share in shares if share > 0) / math.log(len(shares))


def evaluate(
    net: nn.Module, loader: Iterable[Any], *, device: torch.device | str | None = None, amp: bool = False
) -> Evaluation:
    """Evaluate in eval mode and, for a tree, in hard routing; mode and routing are put back.

    Args:
        net: a tree or any module whose output is logits (B, C).
        loader: yields (inputs, targets) or torch-geometric batches with ``y``. In a process group each
            rank brings its own part and gets the total.
        device: where ``net`` is; by default the device of its first parameter.
        amp: bf16 autocast.

    Raises:
        TrainingError: no samples, targets out of range or not one per sample, or an output that is not logits.
    """
    place = torch.device(device) if device is not None else module_device(net)
    leaves = len(leaf_names(net))
    totals: Tensor | None = None  # (K or 1, C, 2): samples, correct ones; float64 sums of loss apart
    loss_sum = torch.zeros((), dtype=torch.float64, device=place)
    with hard_routing(net), torch.no_grad(), torch.autocast(place.type, torch.bfloat16, enabled=amp):
        for batch in loader:
            inputs, targets = split_batch(batch)
            inputs, targets = to_device(inputs, place), targets.to(place)
            logits, leaf = _routed_logits(net, inputs)
            classes = logits.shape[1]
            if totals is None:
                totals = torch.zeros(max(1, leaves) * classes * 2, dtype=torch.long, device=place)
            check_targets(targets, classes)
            check_shape(targets, len(logits), classes)
            labels = class_indices(targets)
            correct = (logits.argmax(1) == labels).long()
            cell = (leaf * classes + labels) * 2
            totals += torch.bincount(torch.cat([cell, cell[correct.bool()] + 1]), minlength=len(totals))
            loss_sum += F.cross_entropy(logits.float(), targets, reduction="sum").double()
    if totals is None:
        raise TrainingError("the evaluation loader is empty; give at least one batch")
    table = all_reduce_sum(totals).view(max(1, leaves), -1, 2).cpu()
    return _summary(table, float(all_reduce_sum(loss_sum)), leaves)


def _routed_logits(net: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and leaf index (B,); leaf 0 for a plain module."""
    if is_tree(net):
        routed: tuple[Tensor, Tensor] = net.forward_routed(*as_arguments(inputs))  # type: ignore[operator]
        return routed
    logits = check_logits(net(*as_arguments(inputs)))
    return logits, torch.zeros(logits.shape[0], dtype=torch.long, device=logits.device)


def _summary(table: Tensor, loss_sum: float, leaves: int) -> Evaluation:
    samples = int(table[..., 0].sum())
    by_class = table.sum(0).double()
    return Evaluation(
        samples=samples,
        loss=loss_sum / samples,
        accuracy=int(table[..., 1].sum()) / samples,
        class_accuracy=tuple((by_class[:, 1] / by_class[:, 0]).tolist()),
        leaf_shares=tuple((table[..., 0].sum(1) / samples).tolist()) if leaves else (),
        leaf_classes=tuple(tuple(row) for row in table[..., 0].tolist()) if leaves else (),
        leaf_correct=tuple(tuple(row) for row in table[..., 1].tolist()) if leaves else (),
    )


def module_device(net: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; CPU for a module without any."""
    for tensor in (*net.parameters(), *net.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def hard_routing(net: nn.Module) -> Iterator[None]:
    """Eval mode and, for a tree, hard routing; every submodule's mode and the routing are put back."""
    modes = [(module, module.training) for module in net.modules()]
    routing = getattr(net, "routing", None) if is_tree(net) else None
    net.eval()
    try:
        if routing is not None:
            net.routing = "hard"  # type: ignore[assignment]
        yield
    finally:
        for module, training in modes:
            module.training = training
        if routing is not None:
            net.routing = routing
