"""Evaluation: hard routing, leaf shares, per-class accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sigmab_plugin.errors import TrainingError
from sigmab_plugin.tuning import balance, evaluate

from .nets import CLASSES, dense, loader, samples, tree


def test_a_tree_is_measured_in_hard_routing_and_left_as_it_was() -> None:
    net = tree().train()
    net.routing = "soft"
    images, targets = samples(60)
    result = evaluate(net, loader(60, batch=7, shuffle=False))
    assert net.training
    assert net.routing == "soft"
    net.eval()
    net.routing = "hard"
    with torch.no_grad():
        logits, leaves = net(images), net.route(images)
    correct = logits.argmax(1) == targets
    assert result.samples == 60
    assert result.accuracy == pytest.approx(float(correct.float().mean()))
    assert result.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)
    for leaf, share in enumerate(result.leaf_shares):
        assert share == pytest.approx(float((leaves == leaf).float().mean()))
    for label in range(CLASSES):
        mine = correct[targets == label].float().mean()
        assert result.class_accuracy[label] == pytest.approx(float(mine))
        column = [row[label] for row in result.leaf_classes]
        assert column == [int(((leaves == leaf) & (targets == label)).sum()) for leaf in range(4)]
    assert result.balance == balance(result.leaf_shares)


def test_a_plain_module_has_no_leaves() -> None:
    result = evaluate(dense(), loader(30))
    assert (result.leaf_shares, result.leaf_classes, result.balance) == ((), (), None)


def test_a_class_without_samples_does_not_count_in_the_mean() -> None:
    images, targets = samples(40)
    keep = targets != 2
    result = evaluate(dense(), [(images[keep], targets[keep])])
    assert math.isnan(result.class_accuracy[2])
    seen = [value for value in result.class_accuracy if not math.isnan(value)]
    assert result.mean_class_accuracy == pytest.approx(sum(seen) / 3)


def test_balance() -> None:
    assert balance([0.25] * 4) == pytest.approx(1.0)
    assert balance([1.0, 0.0, 0.0, 0.0]) == 0.0
    assert balance([0.5, 0.5, 0.0, 0.0]) == pytest.approx(0.5)
    assert balance([1.0]) == 1.0
    assert balance([0.166, 0.308, 0.176, 0.351]) == pytest.approx(0.962, abs=1e-3)


def test_no_samples_and_wrong_targets() -> None:
    with pytest.raises(TrainingError, match="evaluation loader is empty"):
        evaluate(dense(), [])
    images, targets = samples(8)
    with pytest.raises(TrainingError, match="out of range"):
        evaluate(dense(), [(images, targets + 3)])


class _Pair(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.flatten(1), images


def test_an_output_that_is_no_logits() -> None:
    images, targets = samples(8)
    with pytest.raises(TrainingError, match=r"must return logits \(B, C\) .* it returned tuple"):
        evaluate(_Pair(), [(images, targets)])
    with pytest.raises(TrainingError, match=r"it returned \(8, 1, 6, 6\)"):
        evaluate(torch.nn.Identity(), [(images, targets)])


@pytest.mark.parametrize("make", [tree, dense])
def test_targets_of_another_length(make: Callable[[], torch.nn.Module]) -> None:
    images, targets = samples(8)
    with pytest.raises(TrainingError, match=r"class indices \(8,\) .*; got shape \(5,\)"):
        evaluate(make(), [(images, targets[:5])])
