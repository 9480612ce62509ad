"""Properties of the soft-routing losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sigmab_plugin.errors import TrainingError
from sigmab_plugin.tuning.losses import (
    balance_loss,
    classification_loss,
    dense_loss,
    distillation_loss,
    hard_leaf,
    responsibilities,
    responsibility_loss,
    soft_routing_loss,
)

sizes = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(2, 7))
seeds = st.integers(0, 10_000)
quick = settings(max_examples=40, deadline=None)


def sample(
    size: tuple[int, int, int], seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    batch, leaves, classes = size
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, leaves, classes, generator=generator, dtype=dtype)
    log_p = torch.randn(batch, leaves, generator=generator, dtype=dtype).log_softmax(1)
    return logits, log_p, torch.randint(classes, (batch,), generator=generator)


def written_out(logits: Tensor, log_p: Tensor, targets: Tensor, weight: float, tau: float) -> float:
    """Eq. 5-8 in plain loops."""
    total = 0.0
    for x in range(logits.shape[0]):
        ce = [-float(F.log_softmax(leaf, 0)[targets[x]]) for leaf in logits[x]]
        r = [math.exp(-c / tau) for c in ce]
        r = [value / sum(r) for value in r]
        total += sum(math.exp(float(lp)) * c for lp, c in zip(log_p[x], ce, strict=True))
        total -= weight * sum(a * float(lp) for a, lp in zip(r, log_p[x], strict=True))
    return total / logits.shape[0]


@quick
@given(sizes, seeds, st.floats(0.0, 2.0), st.floats(0.2, 3.0))
def test_equations_written_out(size: tuple[int, int, int], seed: int, weight: float, tau: float) -> None:
    logits, log_p, targets = sample(size, seed)
    loss = soft_routing_loss(
        logits, log_p, targets, responsibility_weight=weight, responsibility_temperature=tau
    )
    assert float(loss) == pytest.approx(written_out(logits, log_p, targets, weight, tau), rel=1e-9)


@quick
@given(sizes, seeds, st.sampled_from([0.0, 0.1]))
def test_one_hot_routing_is_that_leafs_cross_entropy(
    size: tuple[int, int, int], seed: int, smoothing: float
) -> None:
    logits, _, targets = sample(size, seed)
    chosen = torch.arange(size[0]) % size[1]
    log_p = F.one_hot(chosen, size[1]).double().log()
    expected = F.cross_entropy(logits[torch.arange(size[0]), chosen], targets, label_smoothing=smoothing)
    torch.testing.assert_close(
        classification_loss(logits, log_p, targets, label_smoothing=smoothing), expected
    )


@quick
@given(sizes, seeds, st.floats(0.01, 10.0))
def test_responsibilities_sum_to_one_and_prefer_the_best_leaf(
    size: tuple[int, int, int], seed: int, tau: float
) -> None:
    logits, _, targets = sample(size, seed)
    r = responsibilities(logits.requires_grad_(), targets, temperature=tau)
    assert not r.requires_grad
    torch.testing.assert_close(r.sum(1), torch.ones(size[0], dtype=r.dtype))
    ce = -logits.log_softmax(-1)[torch.arange(size[0]), :, targets]
    best = r.gather(1, ce.argmin(1, keepdim=True)).squeeze(1)
    assert torch.all(best >= r.max(1).values - 1e-12)


@quick
@given(sizes, seeds)
def test_soft_labels_of_one_class_equal_its_index(size: tuple[int, int, int], seed: int) -> None:
    logits, log_p, targets = sample(size, seed)
    soft = F.one_hot(targets, size[2]).double()
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            soft_routing_loss(logits, log_p, soft, label_smoothing=smoothing),
            soft_routing_loss(logits, log_p, targets, label_smoothing=smoothing),
        )


@quick
@given(sizes, seeds)
def test_order_of_leaves_does_not_matter(size: tuple[int, int, int], seed: int) -> None:
    logits, log_p, targets = sample(size, seed)
    teacher = sample(size, seed + 1)[0][:, 0]
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    options = {"teacher_logits": teacher, "distillation_weight": 0.7}
    torch.testing.assert_close(
        soft_routing_loss(logits[:, order], log_p[:, order], targets, **options),
        soft_routing_loss(logits, log_p, targets, **options),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_against_finite_differences(smoothing: float, soft: bool) -> None:
    logits, _, targets = sample((3, 4, 5), 0)
    scores = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = sample((3, 4, 5), 2)[0][:, 0]
    labels = torch.softmax(sample((3, 4, 5), 3)[0][:, 0], 1) if soft else targets
    fixed = responsibilities(logits, labels, temperature=0.3)

    def loss(leaf_logits: Tensor, routing: Tensor) -> Tensor:
        log_p = routing.log_softmax(1)
        return (
            classification_loss(leaf_logits, log_p, labels, label_smoothing=smoothing)
            + 0.3 * responsibility_loss(fixed, log_p)
            + 0.5 * distillation_loss(leaf_logits, log_p, teacher, temperature=2.0)
        )

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), scores.requires_grad_()))
    whole = soft_routing_loss(
        logits,
        scores.log_softmax(1),
        labels,
        label_smoothing=smoothing,
        teacher_logits=teacher,
        distillation_weight=0.5,
    )
    torch.testing.assert_close(whole, loss(logits, scores))
    for a, b in zip(
        torch.autograd.grad(whole, (logits, scores)),
        torch.autograd.grad(loss(logits, scores), (logits, scores)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_and_impossible_paths_stay_finite(scale: float) -> None:
    logits = (scale * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    log_p = torch.tensor([[0.0, -math.inf, -math.inf]]).expand(4, 3).clone().requires_grad_()
    loss = soft_routing_loss(logits, log_p, torch.tensor([0, 1, 2, 3]), responsibility_temperature=1e-3)
    loss.backward()
    assert torch.isfinite(loss)
    for tensor in (logits, log_p):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    logits, log_p, targets = sample((8, 4, 10), 0, torch.float32)
    teacher = sample((8, 4, 10), 1, torch.float32)[0][:, 0]
    rounded = (logits.bfloat16(), log_p.bfloat16())
    options = {"teacher_logits": teacher.bfloat16(), "distillation_weight": 1.0}
    expected = soft_routing_loss(
        rounded[0].float(),
        rounded[1].float(),
        targets,
        teacher_logits=teacher.bfloat16().float(),
        distillation_weight=1.0,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_routing_loss(*rounded, targets, **options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_straight_through_counts_the_routed_leaf_and_reaches_the_router() -> None:
    logits, _, targets = sample((5, 4, 6), 0)
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    routed = torch.tensor([0, 3, 1, 2, 0])
    logits.requires_grad_()
    hard = soft_routing_loss(logits, scores.log_softmax(1), targets, responsibility_weight=0.0, routed=routed)
    chosen = logits[torch.arange(5), routed]
    torch.testing.assert_close(hard, F.cross_entropy(chosen, targets))
    leaf_grad, router_grad = torch.autograd.grad(hard, (logits, scores))
    unrouted = torch.ones(5, 4).scatter_(1, routed[:, None], 0.0).bool()
    assert torch.all(leaf_grad[unrouted] == 0)
    soft = soft_routing_loss(logits.detach(), scores.log_softmax(1), targets, responsibility_weight=0.0)
    torch.testing.assert_close(router_grad, torch.autograd.grad(soft, scores)[0])


def test_a_leaf_that_agrees_with_the_teacher_costs_nothing() -> None:
    logits, log_p, _ = sample((4, 3, 5), 0)
    same = logits[:, :1].expand(-1, 3, -1)
    assert float(distillation_loss(same, log_p, logits[:, 0], temperature=4.0)) == pytest.approx(0, abs=1e-12)
    assert float(distillation_loss(logits, log_p, logits[:, 0], temperature=4.0)) > 0.01


@quick
@given(sizes, seeds)
def test_balance_is_a_divergence_from_equal_shares(size: tuple[int, int, int], seed: int) -> None:
    _, log_p, _ = sample(size, seed)
    log_p = log_p.requires_grad_()
    shares = log_p.exp().mean(0)
    divergence = (shares * (shares * size[1]).log()).sum()
    loss = balance_loss(log_p, shares)
    torch.testing.assert_close(loss, divergence)
    # With the shares held fixed the gradient is the same, once log_p moves on the simplex, as log-softmax does.
    logits = torch.randn(log_p.shape, dtype=log_p.dtype, requires_grad=True)
    mean = logits.softmax(1).mean(0)
    (expected,) = torch.autograd.grad((mean * (mean * size[1]).log()).sum(), logits)
    (found,) = torch.autograd.grad(balance_loss(logits.log_softmax(1), logits.softmax(1).mean(0)), logits)
    torch.testing.assert_close(found, expected)


def test_balance_of_one_leaf_for_all_is_log_k_and_of_equal_shares_nothing() -> None:
    one = torch.tensor([[0.0, -1e4, -1e4]]).expand(5, 3)
    assert float(balance_loss(one, one.exp().mean(0))) == pytest.approx(math.log(3))
    each = torch.full((3, 3), -1e4).fill_diagonal_(0.0)
    assert float(balance_loss(each, each.exp().mean(0))) == pytest.approx(0.0, abs=1e-6)


def test_dense_loss_is_cross_entropy() -> None:
    logits, _, targets = sample((6, 2, 5), 0)
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            dense_loss(logits[:, 0], targets, label_smoothing=smoothing),
            F.cross_entropy(logits[:, 0], targets, label_smoothing=smoothing),
        )


def test_hard_leaf_follows_the_branches_not_the_most_probable_leaf() -> None:
    p = torch.tensor([[0.55 * 0.5, 0.55 * 0.5, 0.45 * 0.01, 0.45 * 0.99], [0.1, 0.1, 0.7, 0.1]])
    leaves = ("0/0", "0/1", "1/0", "1/1")
    assert hard_leaf(p.log(), leaves).tolist() == [0, 2]
    assert p.argmax(1).tolist() == [3, 2]
    assert hard_leaf(p[:, :3].log(), ("0/0", "0/1", "1")).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"leaf_logits": torch.zeros(2, 5)}, "must be \\(B, K, C\\)"),
        ({"log_p": torch.zeros(2, 4)}, "log_p must be \\(2, 3\\)"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "got shape \\(3,\\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Tensor], words: str) -> None:
    arguments = {
        "leaf_logits": torch.zeros(2, 3, 5),
        "log_p": torch.zeros(2, 3),
        "targets": torch.zeros(2, dtype=torch.long),
        **change,
    }
    with pytest.raises(TrainingError, match=words):
        soft_routing_loss(**arguments)


def test_teacher_with_other_classes_is_refused() -> None:
    logits, log_p, targets = sample((2, 3, 5), 0)
    with pytest.raises(TrainingError, match="teacher logits have shape \\(2, 7\\)"):
        soft_routing_loss(logits, log_p, targets, teacher_logits=torch.zeros(2, 7), distillation_weight=1.0)
