"""What an average hides: rare classes, calibration, corrupted inputs, and whether routing holds still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sigmab_plugin.data import point_cloud_augment
from sigmab_plugin.tuning import Evaluation

from .experiments import Experiment

Corruption = Callable[[Any, torch.Generator], Any]


def _jitter(batch: Any, generator: torch.Generator) -> Any:
    return point_cloud_augment(batch, generator, scale=(1.0, 1.0), shift=0.0, jitter=0.02)


def _lost_points(batch: Any, generator: torch.Generator) -> Any:
    pos, index = batch
    clouds = int(index[-1]) + 1
    pos = pos.view(clouds, -1, 3)
    lost = torch.rand(pos.shape[:2], generator=generator) < 0.5
    return torch.where(lost[..., None], pos[:, :1], pos).reshape(-1, 3), index


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.2 * torch.randn(images.shape, generator=generator)


def _blur(images: Tensor, generator: torch.Generator) -> Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)


#: By kind of data: name -> corruption of one batch. The first is also the one that routing is compared under.
CORRUPTIONS: dict[str, dict[str, Corruption]] = {
    "points": {"jitter of 0.02": _jitter, "half of the points lost": _lost_points},
    "image": {"noise of 0.2 standard deviations": _noise, "3x3 blur": _blur},
}


def robustness(net: nn.Module, experiment: Experiment) -> dict[str, Any]:
    """Accuracy in percent under each corruption of the test part; calibration error; leaves that stay.

    ``net`` is on the CPU and in evaluation mode. Noise is the same for every network.
    """
    corruptions = CORRUPTIONS[experiment.test.kind]
    routed = hasattr(net, "route")
    right = dict.fromkeys(corruptions, 0)
    stayed, total = 0, 0
    confidence, correct = [], []
    with torch.no_grad():
        for step, (inputs, labels) in enumerate(experiment.batches(experiment.test)):
            top = _call(net, inputs).float().softmax(1).max(1)
            confidence.append(top.values)
            correct.append((top.indices == labels).float())
            leaf = _call(net.route, inputs) if routed else None
            for number, (name, corrupt) in enumerate(corruptions.items()):
                changed = corrupt(inputs, torch.Generator().manual_seed(1000 * step + number))
                right[name] += int((_call(net, changed).argmax(1) == labels).sum())
                if number == 0 and leaf is not None:
                    stayed += int((_call(net.route, changed) == leaf).sum())
            total += len(labels)
    record: dict[str, Any] = {name: round(100 * hits / total, 3) for name, hits in right.items()}
    record["calibration_error"] = round(100 * _gap(torch.cat(confidence), torch.cat(correct)), 3)
    if routed:
        record["leaf_unchanged"] = round(100 * stayed / total, 3)
    return record


def rare_class_accuracy(result: Evaluation, experiment: Experiment) -> float:
    """Mean accuracy over the quarter of the classes with the fewest training samples."""
    counts = np.bincount(experiment.train.labels, minlength=len(result.class_accuracy))
    rare = np.argsort(counts, kind="stable")[: max(1, len(counts) // 4)]
    return float(np.nanmean([result.class_accuracy[i] for i in rare]))


def _gap(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over equal-width bins."""
    slot = (confidence * bins).long().clamp_(max=bins - 1)
    gaps = torch.zeros(bins).index_add_(0, slot, correct - confidence)
    return float(gaps.abs().sum() / len(confidence))


def _call(function: Any, inputs: Any) -> Tensor:
    result: Tensor = function(*inputs) if isinstance(inputs, tuple) else function(inputs)
    return result
