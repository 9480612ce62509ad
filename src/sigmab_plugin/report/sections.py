"""Bodies of the page's built-in parts. Each takes the report's data and returns HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from . import format as fmt
from .analysis import balance, class_purity, leaf_accuracy, leaf_shares, panel_counts
from .charts import Level, Line, line_chart, scatter
from .data import ChannelPanel, Curve, LeafStatistics, ReportData
from .style import leaf_color
from .tree_figure import tree_svg

#: Below it a leaf starves: the tree is little more than one path.
LOW_BALANCE = 0.5

#: Rows of one block of the class heatmap; more classes make more blocks side by side.
_HEAT_ROWS = 25

_TERMS = (
    ("Active parameters", "Weights that one input reads: backbone, the routers and projections on its way, the "
     "specializers and the head of its leaf. For a tree the largest path is printed."),
    ("Stored parameters", "All weights that are kept. A tree stores more than one path, and often more than the dense "
     "network: the gain is in what is read, not in what is kept."),
    ("MACs", "Multiply-accumulates of convolutions and matrix products for one sample, on the largest path. "
     "Element-wise work and normalisation are not counted."),
    ("Bytes", "Parameters and buffers at the precision in which the network was measured: counted, not traffic "
     "measured on a device."),
    ("Static twin", "One path of the tree's shape, cut from the same dense network by the same statistics without "
     "clusters, and trained with the same steps. A tree that does not beat it gains nothing by routing."),
    ("Leaf share", "Part of the held-out samples that hard routing sends to a leaf."),
    ("Balance", "Entropy of the leaf shares over its maximum, ln of the number of leaves: 1 is an even split, 0 is one "
     "leaf for everything."),
    ("Shared and specific channels", "A branch keeps some dense channels that its sibling keeps too (active under both "
     "clusters) and some of its own (more active under its cluster than under the other)."),
)


def tree(data: ReportData) -> str:
    if data.tree is None:
        return _empty("The tree was not recorded: there is no SigmaB network in this report.")
    shares = None if data.leaves is None else leaf_shares(data.leaves)
    flow = (
        "Line thickness and percentages show the share of held-out samples that hard routing sends each way."
        if shares is not None
        else "No samples were routed for this report, so all lines have the same thickness."
    )
    wide, narrow = (tree_svg(data.tree, shares, compact=compact) for compact in (False, True))
    return (
        f'<p class="about">One input runs from the backbone to one leaf. A router, with its projection, picks the '
        f"branch at every inner node. {flow}</p>"
        f'<div class="card tree"><div class="scroll" tabindex="0" role="region" aria-label="Tree">{wide}{narrow}</div></div>'
    )


def leaves(data: ReportData) -> str:
    statistics = data.leaves
    if statistics is None or not sum(map(sum, statistics.counts)):
        return _empty("No held-out samples were routed. <code>sigmab evaluate --data …</code> on a saved network fills this in.")
    shares = leaf_shares(statistics)
    samples = sum(map(sum, statistics.counts))
    return (
        f'<p class="about">Leaves chosen by hard routing for {fmt.integer(samples)} held-out samples.</p>'
        f'<div class="grid"><div class="card">{_share_bars(statistics, shares)}</div>'
        f'<div class="card" style="{_heat_span(len(statistics.classes))}">{_heatmap(statistics)}</div></div>'
    )


def _share_bars(statistics: LeafStatistics, shares: Sequence[float]) -> str:
    even = balance(shares)
    low = f' <span style="color:var(--bad)">low: under {LOW_BALANCE}</span>' if even < LOW_BALANCE else ""
    scale = max(max(shares), 1 / len(shares)) * 1.06
    bars = ""
    for index, (leaf, share, hit) in enumerate(zip(statistics.leaves, shares, leaf_accuracy(statistics), strict=True)):
        right = fmt.percent(share) + ("" if hit is None else f" · {fmt.percent(hit)} correct")
        bars += (
            f'<div><div class="bar-head"><b>leaf {escape(leaf)}</b><span>{right}</span></div><div class="track">'
            f'<div class="fill" style="width:{100 * share / scale:.2f}%;background:{leaf_color(index, len(shares))}"></div>'
            f'<div class="even" style="left:{100 / len(shares) / scale:.2f}%"></div></div></div>'
        )
    return (
        f'<h3>Leaf shares</h3><div class="meter"><strong>{even:.2f}</strong><span>balance{low}</span></div>'
        f'<div class="bars">{bars}</div><p class="aside">The mark on each bar is an even share, '
        f"{fmt.percent(1 / len(shares))}.</p>"
    )


def _heat_span(classes: int) -> str:
    return "grid-column:1/-1" if classes > _HEAT_ROWS else ""


def _heatmap(statistics: LeafStatistics) -> str:
    """Share of each class per leaf; classes ordered by their main leaf, then by how clear it is."""
    order = sorted(range(len(statistics.classes)), key=lambda row: _heat_order(statistics.counts[row]))
    blocks = [order[start : start + _HEAT_ROWS] for start in range(0, len(order), _HEAT_ROWS)]
    head = "".join(f'<th scope="col">{escape(leaf)}</th>' for leaf in statistics.leaves)
    tables = ""
    for block in blocks:
        rows = "".join(
            f'<tr><th scope="row" title="{escape(statistics.classes[row])}">{escape(statistics.classes[row])}</th>'
            f"{_heat_cells(statistics.counts[row])}</tr>"
            for row in block
        )
        tables += (
            f'<div class="scroll"><table class="heat"><thead><tr><th scope="col">class</th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    purity = class_purity(statistics)
    return (
        "<h3>Leaf of each class</h3>"
        '<p class="aside" style="margin:0 0 10px">Percent of a class\'s samples per leaf, classes grouped by their '
        f"main leaf. {fmt.percent(purity)} of the samples are in their class's main leaf.</p>"
        f'<div class="grid" style="grid-template-columns:repeat(auto-fit,minmax(min(100%,240px),1fr))">{tables}</div>'
    )


def _heat_order(counts: Sequence[int]) -> tuple[int, float]:
    total = sum(counts)
    if not total:
        return len(counts), 0.0
    main = max(range(len(counts)), key=counts.__getitem__)
    return main, -counts[main] / total


def _heat_cells(counts: Sequence[int]) -> str:
    total = sum(counts)
    cells = ""
    for value in counts:
        share = value / total if total else 0.0
        if not value:
            cells += '<td class="nil">·</td>'
            continue
        shown = "<1" if share < 0.005 else f"{100 * share:.0f}"
        hot = ' class="hot"' if share > 0.5 else ""
        # A visible floor, so that a small share still differs from none.
        cells += f'<td{hot} style="background:rgb(var(--heat) / {0.08 + 0.92 * share:.2f})">{escape(shown)}</td>'
    return cells


def channels(data: ReportData) -> str:
    if not data.channels:
        return _empty("The plan holds no channel statistics, so there is nothing to draw.")
    panels = "".join(f'<div class="card">{_panel(panel)}</div>' for panel in data.channels)
    return (
        '<p class="about">Every dot is a channel of the dense network at its mean activation under the two clusters of '
        "a node. Channels near the diagonal serve both; those far from it belong to one branch.</p>"
        f'<div class="grid">{panels}</div>'
    )


def _panel(panel: ChannelPanel) -> str:
    counts = panel_counts(panel)
    kinds = (
        ("dropped", "dropped", "var(--dropped)"),
        ("0", "branch 0 only", "var(--branch-0)"),
        ("1", "branch 1 only", "var(--branch-1)"),
        ("shared", "shared", "var(--shared)"),
    )
    points = list(zip(*panel.activation, strict=True))
    drawn = [
        (name, color, [point for point, kept in zip(points, panel.kept, strict=True) if kept == kind])
        for kind, name, color in kinds
    ]
    legend = "".join(
        f'<span><i class="key" style="background:{color}"></i>{name} {counts[kind]}</span>'
        for kind, name, color in reversed(kinds)
        if counts[kind]
    )
    node = "root" if not panel.node else f"node {panel.node}"
    picture = scatter(
        drawn,
        label=f"Channels of {panel.group} at the {node}: mean activation under cluster 0 and cluster 1",
        x_title="mean activation, cluster 0",
        y_title="cluster 1",
    )
    return (
        f"<h3>{escape(node.capitalize() if node == 'root' else node)} · {escape(panel.group)}</h3>"
        f'<div class="legend">{legend}</div>'
        + (picture or _empty("All activations of this group are missing or not finite."))
    )


def curves(data: ReportData) -> str:
    if not any(curve.epochs for curve in data.curves):
        return _empty("No training was recorded. <code>sigmab finetune</code> writes the log that is drawn here.")
    cards = []
    for metric, title, percent in (
        ("val_accuracy", "Validation accuracy", True),
        ("train_loss", "Training loss", False),
        ("balance", "Balance of the leaves", False),
    ):
        cards.append(_metric(data, metric, title, percent))
    cards.extend(_share_curves(curve) for curve in data.curves)
    shown = "".join(f'<div class="card">{card}</div>' for card in cards if card)
    return (
        '<p class="about">One point per epoch. Loss is each run\'s own: the tree\'s holds routing terms that a '
        f'single network does not have, so losses are not comparable across networks.</p><div class="grid">{shown}</div>'
    )


def _metric(data: ReportData, metric: str, title: str, percent: bool) -> str:
    lines = [
        Line(curve.name, f"var(--{curve.role})", curve.epochs, curve.values[metric])
        for curve in data.curves
        if metric in curve.values and curve.role != "dense"
    ]
    levels = []
    if metric == "val_accuracy":
        levels = [
            Level("dense, at its end", f"var(--{curve.role})", final)
            for curve in data.curves
            if curve.role == "dense" and (final := _last(curve.values.get(metric, []))) is not None
        ]
    bounds = (0.0, 1.0) if metric == "balance" else None
    picture = line_chart(lines, label=f"{title} per epoch", levels=levels, percent=percent, bounds=bounds)
    if not picture:
        return ""
    legend = "".join(
        f'<span><i class="key" style="background:{line.color}"></i>{escape(line.name)}</span>'
        for line in lines
        if any(value is not None for value in line.y)
    )
    legend += "".join(
        f'<span><i class="key dash" style="border-color:{level.color}"></i>{escape(level.name)}</span>' for level in levels
    )
    return f'<h3>{title}</h3><div class="legend">{legend}</div>{picture}'


def _share_curves(curve: Curve) -> str:
    """Leaf shares per epoch of a tree's fine-tuning."""
    records = curve.values.get("leaf_shares", [])
    leaves = max((len(record) for record in records if record), default=0)
    lines = [
        Line(
            f"leaf {index}",
            leaf_color(index, leaves),
            curve.epochs,
            [record[index] if record and index < len(record) else None for record in records],
        )
        for index in range(leaves)
    ]
    picture = line_chart(lines, label=f"Leaf shares of {curve.name} per epoch", percent=True)
    if not picture:
        return ""
    legend = "".join(
        f'<span><i class="key" style="background:{line.color}"></i>{escape(line.name)}</span>' for line in lines
    )
    return f'<h3>Leaf shares in training</h3><div class="legend">{legend}</div>{picture}'


def _last(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None and math.isfinite(value)), None)


def terms(data: ReportData) -> str:
    entries = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in _TERMS)
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    return (f'<ul class="notes">{notes}</ul>' if notes else "") + f'<div class="card" style="margin-top:14px"><dl class="terms">{entries}</dl></div>'


def origin(data: ReportData) -> str:
    entries = dict(data.provenance)
    command = entries.pop("command", "")
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{escape(value)}</td></tr>' for label, value in entries.items()
    )
    shown = f'<pre tabindex="0">{escape(command)}</pre>' if command else ""
    table = f'<div class="card"><table class="origin"><tbody>{rows}</tbody></table></div>' if rows else ""
    return shown + table or _empty("The command and the versions were not recorded.")


def _empty(text: str) -> str:
    return f'<p class="empty">{text}</p>'
