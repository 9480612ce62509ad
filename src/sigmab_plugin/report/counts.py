"""From networks, plans and training histories to the plain data of a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..counting import macs, parameter_count, storage_bytes
from .analysis import kept_roles
from .data import ChannelPanel, Curve, LeafStatistics, Row, TreeFigure, TreePart

if TYPE_CHECKING:
    from ..tree import SigmaBNet
    from ..tree.plan import Plan
    from ..tuning import Evaluation, History


def module_row(
    name: str, module: nn.Module, example: Any, *, role: str = "other", accuracy: float | None = None
) -> Row:
    """Counts of a network whose every parameter is read for every input.

    Args:
        example: inputs of one sample (a batch of one); a tuple is positional arguments.
    """
    parameters, size = parameter_count(module), storage_bytes(module)
    return Row(
        name=name,
        role=role,
        accuracy=accuracy,
        active_parameters=parameters,
        stored_parameters=parameters,
        active_macs=macs(module, example),
        active_bytes=size,
        stored_bytes=size,
    )


def net_row(name: str, net: SigmaBNet, example: Any, *, accuracy: float | None = None) -> Row:
    """Counts of a tree; active is its largest path, routers and projections included.

    Args:
        example: inputs of one sample (a batch of one); a tuple is positional arguments.
    """
    counts = net.parameter_counts()
    paths = (storage_bytes(*(module for _, module in net.path_modules(leaf))) for leaf in net.leaves)
    return Row(
        name=name,
        role="sigmab",
        accuracy=accuracy,
        active_parameters=counts.active,
        stored_parameters=counts.total,
        active_macs=net.macs(example).active,
        active_bytes=max(paths),
        stored_bytes=storage_bytes(net),
    )


def tree_figure(net: SigmaBNet) -> TreeFigure:
    """Parts of ``net`` with their parameters and the width of the feature that leaves them."""
    from ..tree.plan import module_key, paths_at

    plan = net.plan
    parts = [TreePart("backbone", "", parameter_count(net.backbone), plan.feature_width(""))]
    parts += [
        TreePart("router", path, parameter_count(net.routers[module_key(path)])) for path in net.inner_nodes
    ]
    for path in (path for depth in range(plan.depth) for path in paths_at(depth + 1)):
        count = parameter_count(net.specializers[module_key(path)])
        parts.append(TreePart("specializer", path, count, plan.feature_width(path)))
    parts += [TreePart("head", leaf, parameter_count(net.heads[module_key(leaf)])) for leaf in net.leaves]
    return TreeFigure(tuple(parts), net.leaves, tuple(plan.config.levels), plan.config.head)


def leaf_counts(net: SigmaBNet, evaluation: Evaluation, classes: Iterable[str]) -> LeafStatistics:
    """Where ``evaluation`` saw the samples go; ``classes`` are names in order of their index."""
    return LeafStatistics(
        leaves=net.leaves,
        classes=tuple(classes),
        counts=tuple(zip(*evaluation.leaf_classes, strict=True)),
        correct=tuple(zip(*evaluation.leaf_correct, strict=True)),
    )


def channel_panels(plan: Plan) -> tuple[ChannelPanel, ...]:
    """One panel per inner node: the output group that leaves its level, with who keeps each channel.

    A node whose level has several such groups shows the largest.
    """
    from ..tree.plan import child

    panels = []
    for node, split in plan.splits.items():
        groups = [group for group in plan.groups if group.name in split.activation]
        if not groups:
            continue
        group = max(groups, key=lambda group: group.size)
        rows = split.activation[group.name]
        keep = [
            plan.branches[child(node, branch)].keep.get(group.name, range(group.size)) for branch in (0, 1)
        ]
        panels.append(ChannelPanel(node, group.name, rows, kept_roles(group.size, keep)))
    return tuple(panels)


def curve(name: str, history: History, *, role: str) -> Curve:
    """A training history as lines of the page."""
    records = history.records
    return Curve(
        name=name,
        role=role,
        epochs=tuple(record.epoch for record in records),
        values={
            "train_loss": [record.train_loss for record in records],
            "val_accuracy": [record.val_accuracy for record in records],
            "balance": [record.balance for record in records],
            "leaf_shares": [list(record.leaf_shares) for record in records],
        },
    )
