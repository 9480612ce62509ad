"""Soft-routing losses (arXiv 2606.09924, eq. 5-8), as pure functions of leaf logits and path probabilities.

Shapes: B samples, K leaves, C classes. ``leaf_logits`` is (B, K, C); ``log_p`` is (B, K), the natural
logarithm of the path probabilities p_leaf(k|x) (eq. 2). ``targets`` are class indices (B,) or soft labels
(B, C). All sums are made in float32 at least, whatever the precision of the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import TrainingError
from .batches import check_shape

#: A path of probability zero costs this much instead of infinity; log-softmax of finite logits stays above.
_LOG_P_FLOOR = -1e4


def classification_loss(
    leaf_logits: Tensor, log_p: Tensor, targets: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Eq. 5: mean over x of sum_k p_leaf(k|x) CE(y_k, y).

    This is the expected loss of the leaf drawn, not the cross-entropy of mixed logits.

    Returns:
        Scalar.

    Raises:
        TrainingError: shapes that do not fit together.
    """
    _check_shapes(leaf_logits, log_p, targets)
    cross_entropy = _cross_entropy(_log_softmax(leaf_logits), targets, label_smoothing)
    return (_wide(log_p).exp() * cross_entropy).sum(1).mean()


def responsibilities(leaf_logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Eq. 6: r_k = softmax_k(-CE(y_k, y) / tau_r), without gradient and without label smoothing.

    Returns:
        (B, K), rows sum to one.
    """
    with torch.no_grad():
        return _responsibilities(_log_softmax(leaf_logits), targets, temperature)


def responsibility_loss(responsibility: Tensor, log_p: Tensor) -> Tensor:
    """Eq. 7: mean over x of -sum_k r_k log p_leaf(k|x); ``responsibility`` is (B, K).

    Returns:
        Scalar.
    """
    return -(responsibility.detach() * _wide(log_p).clamp(min=_LOG_P_FLOOR)).sum(1).mean()


def balance_loss(log_p: Tensor, shares: Tensor) -> Tensor:
    """sum_k m_k log(K m_k), with m the mean path probabilities: 0 where all leaves get equal shares, at most log K.

    Written as a mean over samples with log(K m) held fixed, which has the same value and gradient and is a sum
    over samples, so that processes may each compute their part. Load balancing of mixtures of experts (Shazeer et al.,
    arXiv 1701.06538); not part of the paper.

    Args:
        log_p: (B, K), log of the path probabilities.
        shares: (K,), m over the global batch; no gradient passes through it.

    Returns:
        Scalar.
    """
    excess = (shares.detach().to(_wide(log_p).dtype) * log_p.shape[1]).clamp(min=1e-12).log()
    return (_wide(log_p).exp() * excess).sum(1).mean()


def distillation_loss(
    leaf_logits: Tensor, log_p: Tensor, teacher_logits: Tensor, *, temperature: float
) -> Tensor:
    """Mean over x of T^2 sum_k p_leaf(k|x) KL(softmax(teacher / T) || softmax(y_k / T)).

    The teacher (B, C) gets no gradient; the router does, through p_leaf. Not part of the paper.

    Returns:
        Scalar.

    Raises:
        TrainingError: the teacher has another number of classes.
    """
    return _distillation(leaf_logits, _wide(log_p).exp(), teacher_logits, temperature)


def soft_routing_loss(
    leaf_logits: Tensor,
    log_p: Tensor,
    targets: Tensor,
    *,
    responsibility_weight: float = 0.3,
    responsibility_temperature: float = 0.3,
    label_smoothing: float = 0.0,
    teacher_logits: Tensor | None = None,
    distillation_weight: float = 0.0,
    distillation_temperature: float = 2.0,
    routed: Tensor | None = None,
) -> Tensor:
    """Eq. 8: L = L_cls + lambda L_resp, and by option + w L_distill (see :func:`distillation_loss`).

    Args:
        leaf_logits: (B, K, C).
        log_p: (B, K), log of the path probabilities.
        targets: (B,) class indices or (B, C) soft labels.
        responsibility_weight: lambda.
        responsibility_temperature: tau_r of eq. 6.
        label_smoothing: of L_cls; responsibilities use the plain cross-entropy.
        teacher_logits: (B, C) of the dense network; None leaves the teacher term out.
        distillation_weight: w.
        distillation_temperature: T.
        routed: (B,) leaf index of hard routing. Given, the forward value counts the routed leaf alone and
            the gradient reaches the router as in soft routing (straight-through); not part of the paper.

    Returns:
        Scalar.

    Raises:
        TrainingError: shapes that do not fit together.
    """
    _check_shapes(leaf_logits, log_p, targets)
    log_q = _log_softmax(leaf_logits)
    log_p = _wide(log_p)
    weights = log_p.exp()
    if routed is not None:
        weights = F.one_hot(routed, log_p.shape[1]).to(weights.dtype) + (weights - weights.detach())
    loss = (weights * _cross_entropy(log_q, targets, label_smoothing)).sum(1).mean()
    if responsibility_weight and log_p.shape[1] > 1:
        with torch.no_grad():
            responsibility = _responsibilities(log_q, targets, responsibility_temperature)
        loss = loss + responsibility_weight * responsibility_loss(responsibility, log_p)
    if teacher_logits is not None and distillation_weight:
        term = _distillation(leaf_logits, weights, teacher_logits, distillation_temperature)
        loss = loss + distillation_weight * term
    return loss


def dense_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    teacher_logits: Tensor | None = None,
    distillation_weight: float = 0.0,
    distillation_temperature: float = 2.0,
) -> Tensor:
    """:func:`soft_routing_loss` of a network with one path: cross-entropy, plus the teacher term by option.

    ``logits`` is (B, C). A dense network or a static twin is trained with exactly the terms of a tree.
    """
    return soft_routing_loss(
        logits.unsqueeze(1),
        torch.zeros(logits.shape[0], 1, dtype=_wide(logits).dtype, device=logits.device),
        targets,
        label_smoothing=label_smoothing,
        teacher_logits=teacher_logits,
        distillation_weight=distillation_weight,
        distillation_temperature=distillation_temperature,
    )


def hard_leaf(log_p: Tensor, leaves: tuple[str, ...]) -> Tensor:
    """Leaf of sequential argmax routing, from path probabilities.

    Not the argmax over leaves: with root 0.55 / 0.45 and children 0.5 / 0.5 and 0.99 / 0.01 the most
    probable leaf lies on the branch that hard routing does not take.

    Args:
        log_p: (B, K), log of the path probabilities.
        leaves: path of every leaf, such as ``("0/0", "0/1", "1/0", "1/1")``.

    Returns:
        (B,) long, the index into ``leaves``.
    """
    return _descend(_wide(log_p.detach()), _paths(leaves), list(range(len(leaves))), 0)


def temper(log_p: Tensor, leaves: tuple[str, ...], temperature: float) -> Tensor:
    """Path probabilities with the logits of every router divided by ``temperature``.

    Branch probabilities are recovered from the sums over the leaves below, so this needs no access to the
    routers and leaves hard routing unchanged. Shapes as in :func:`hard_leaf`; returns (B, K).
    """
    if temperature == 1.0:
        return log_p
    log_p = _wide(log_p).clamp(min=_LOG_P_FLOOR)
    paths = _paths(leaves)
    columns: dict[int, Tensor] = {}

    def soften(members: list[int], depth: int, above: Tensor) -> None:
        if len(members) == 1:
            columns[members[0]] = above
            return
        branches = _branches(paths, members, depth)
        mass = torch.stack([log_p[:, inside].logsumexp(1) for inside in branches], 1)
        branch = F.log_softmax(mass / temperature, dim=1)
        for position, inside in enumerate(branches):
            soften(inside, depth + 1, above + branch[:, position])

    soften(list(range(len(leaves))), 0, log_p.new_zeros(log_p.shape[0]))
    return torch.stack([columns[leaf] for leaf in range(len(leaves))], 1)


def _paths(leaves: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [tuple(leaf.split("/")) for leaf in leaves]


def _branches(paths: list[tuple[str, ...]], members: list[int], depth: int) -> list[list[int]]:
    """``members`` grouped by the branch that they take at ``depth``."""
    branches: dict[str, list[int]] = {}
    for leaf in members:
        branches.setdefault(paths[leaf][depth], []).append(leaf)
    return list(branches.values())


def _descend(log_p: Tensor, paths: list[tuple[str, ...]], members: list[int], depth: int) -> Tensor:
    if len(members) == 1:
        return torch.full((log_p.shape[0],), members[0], dtype=torch.long, device=log_p.device)
    branches = _branches(paths, members, depth)
    mass = torch.stack([log_p[:, inside].logsumexp(1) for inside in branches], 1)
    below = torch.stack([_descend(log_p, paths, inside, depth + 1) for inside in branches], 1)
    return below.gather(1, mass.argmax(1, keepdim=True)).squeeze(1)


def _wide(tensor: Tensor) -> Tensor:
    """float32 for half precisions; float32 and float64 pass."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _log_softmax(leaf_logits: Tensor) -> Tensor:
    return F.log_softmax(_wide(leaf_logits), dim=-1)


def _cross_entropy(log_q: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(B, K): cross-entropy of every leaf with the sample's target."""
    if targets.dim() == 2:
        loss = -(targets.to(log_q.dtype).unsqueeze(1) * log_q).sum(-1)
    else:
        index = targets.view(-1, 1, 1).expand(-1, log_q.shape[1], 1)
        loss = -log_q.gather(2, index).squeeze(2)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_q.mean(-1)
    return loss


def _responsibilities(log_q: Tensor, targets: Tensor, temperature: float) -> Tensor:
    cross_entropy = _cross_entropy(log_q, targets)
    best = cross_entropy.amin(1, keepdim=True)  # subtracted before the division: no overflow at small tau
    return F.softmax((best - cross_entropy) / temperature, dim=1)


def _distillation(leaf_logits: Tensor, weights: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    if teacher_logits.shape != (leaf_logits.shape[0], leaf_logits.shape[2]):
        raise TrainingError(
            f"teacher logits have shape {tuple(teacher_logits.shape)}, expected "
            f"({leaf_logits.shape[0]}, {leaf_logits.shape[2]}): the teacher must score the same samples and "
            "classes as the network; give the dense network that it was made from"
        )
    log_q = F.log_softmax(_wide(leaf_logits) / temperature, dim=-1)
    log_t = F.log_softmax(_wide(teacher_logits.detach()) / temperature, dim=-1).to(log_q.dtype).unsqueeze(1)
    divergence = (log_t.exp() * (log_t - log_q)).sum(-1)
    return temperature**2 * (weights * divergence).sum(1).mean()


def _check_shapes(leaf_logits: Tensor, log_p: Tensor, targets: Tensor) -> None:
    if leaf_logits.dim() != 3:
        raise TrainingError(f"leaf logits must be (B, K, C); got shape {tuple(leaf_logits.shape)}")
    batch, leaves, classes = leaf_logits.shape
    if log_p.shape != (batch, leaves):
        raise TrainingError(f"log_p must be ({batch}, {leaves}) as the leaf logits; got {tuple(log_p.shape)}")
    check_shape(targets, batch, classes)
