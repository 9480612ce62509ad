"""Bodies of the page's built-in parts. Each takes the report's data and returns HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..tuning import balance
from . import format as fmt
from .analysis import class_purity, last_value, leaf_accuracy, leaf_shares, panel_counts
from .charts import Cloud, Level, Line, line_chart, scatter
from .data import ChannelPanel, Curve, LeafStatistics, ReportData
from .markup import empty, legend, scroll_box, tag
from .style import leaf_color
from .tree_figure import tree_svg

#: Below it a leaf starves: the tree is little more than one path.
LOW_BALANCE = 0.5

#: Rows of one block of the class heatmap. More classes make up to three blocks, side by side where there is room;
#: above the second number they scroll in a box of their own.
_HEAT_ROWS, _HEAT_TALL = 25, 120

#: (role in the plan, name in the legend, colour), in drawing order: the last lies on top.
_CHANNEL_KINDS = (
    ("dropped", "dropped", "var(--dropped)"),
    ("0", "branch 0 only", "var(--branch-0)"),
    ("1", "branch 1 only", "var(--branch-1)"),
    ("shared", "shared", "var(--shared)"),
)


def tree(data: ReportData) -> str:
    if data.tree is None:
        return empty("The tree was not recorded: there is no SigmaB network in this report.")
    shares = None if data.leaves is None else leaf_shares(data.leaves)
    flow = (
        "Line thickness and percentages show the share of held-out samples that hard routing sends each way."
        if shares is not None
        else "No samples were routed for this report, so all lines have the same thickness."
    )
    about = (
        "One input runs from the backbone to one leaf; at every inner node a router, with its projection, "
        f"picks the branch. {flow}"
    )
    drawings = [tree_svg(data.tree, shares, compact=compact) for compact in (False, True)]
    return tag("p", about, cls="about") + tag("div", scroll_box("Tree", *drawings), cls="card tree")


def leaves(data: ReportData) -> str:
    statistics = data.leaves
    samples = 0 if statistics is None else sum(map(sum, statistics.counts))
    if statistics is None or not samples:
        return empty(
            "No held-out samples were routed. <code>sigmab evaluate --data …</code> on a saved network "
            "fills this in."
        )
    about = f"Leaves chosen by hard routing for {fmt.integer(samples)} held-out samples."
    stacked = len(statistics.classes) > _HEAT_ROWS or len(statistics.leaves) > 6
    return tag("p", about, cls="about") + tag(
        "div",
        tag("div", _share_bars(statistics), cls="card"),
        tag("div", _heatmap(statistics), cls="card"),
        cls="grid top stacked" if stacked else "grid top",
    )


def _share_bars(statistics: LeafStatistics) -> str:
    shares = leaf_shares(statistics)
    even = 1 / len(shares)
    scale = 1.06 * max(*shares, even)
    bars = []
    for index, (leaf, share, hit) in enumerate(
        zip(statistics.leaves, shares, leaf_accuracy(statistics), strict=True)
    ):
        right = fmt.percent(share) + ("" if hit is None else f" · {fmt.percent(hit)} correct")
        fill = f"width:{100 * share / scale:.2f}%;background:{leaf_color(index, len(shares))}"
        track = tag("div", cls="fill", style=fill) + tag(
            "div", cls="even", style=f"left:{100 * even / scale:.2f}%"
        )
        head = tag("b", f"leaf {escape(leaf)}") + tag("span", right)
        bars.append(tag("div", tag("div", head, cls="bar-head"), tag("div", track, cls="track")))
    score = balance(shares)
    low = f", low: a leaf starves under {LOW_BALANCE}" if score < LOW_BALANCE else ""
    return (
        tag("h3", "Leaf shares")
        + tag(
            "div",
            tag("strong", f"{score:.2f}"),
            tag("span", f"balance{low}"),
            cls="low meter" if low else "meter",
        )
        + tag("div", *bars, cls="bars")
        + tag("p", f"The mark on each bar is an even share, {fmt.percent(even)}.", cls="aside")
    )


def _heatmap(statistics: LeafStatistics) -> str:
    """Share of each class per leaf; classes ordered by their main leaf, then by how clear it is."""
    order = sorted(range(len(statistics.classes)), key=lambda row: _heat_order(statistics.counts[row]))
    head = [tag("th", "class", scope="col")]
    head += [tag("th", escape(leaf), scope="col") for leaf in statistics.leaves]
    tables = []
    height = max(_HEAT_ROWS, -(-len(order) // 3))
    for start in range(0, len(order), height):
        rows = []
        for row in order[start : start + height]:
            name = statistics.classes[row]
            heading = tag("th", escape(name), scope="row", title=name)
            rows.append(tag("tr", heading, *_heat_cells(statistics.counts[row])))
        table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), cls="heat")
        tables.append(scroll_box("Leaf of each class", table))
    box = tag("div", *tables, cls="heats tall" if len(order) > _HEAT_TALL else "heats")
    about = (
        "Percent of a class's samples per leaf, classes grouped by their main leaf. "
        f"{fmt.percent(class_purity(statistics))} of the samples are in their class's main leaf."
    )
    return tag("h3", "Leaf of each class") + tag("p", about, cls="hint") + box


def _heat_order(counts: Sequence[int]) -> tuple[int, float]:
    total = sum(counts)
    if not total:
        return len(counts), 0.0
    main = max(range(len(counts)), key=counts.__getitem__)
    return main, -counts[main] / total


def _heat_cells(counts: Sequence[int]) -> list[str]:
    total = sum(counts)
    cells = []
    for value in counts:
        if not value:
            cells.append(tag("td", "·", cls="nil"))
            continue
        share = value / total
        # A visible floor, so that a small share still differs from none.
        heat = f"background:rgb(var(--heat) / {0.08 + 0.92 * share:.2f})"
        shown = "&lt;1" if share < 0.005 else f"{100 * share:.0f}"
        cells.append(tag("td", shown, cls="hot" if share > 0.7 else None, style=heat))
    return cells


def channels(data: ReportData) -> str:
    if not data.channels:
        return empty("The plan holds no channel statistics, so there is nothing to draw.")
    about = (
        "Every dot is a channel of the dense network at its mean activation under the two clusters of a node. "
        "Channels near the diagonal serve both; those far from it belong to one branch."
    )
    panels = [tag("div", _panel(panel), cls="card") for panel in data.channels]
    return tag("p", about, cls="about") + tag("div", *panels, cls="grid")


def _panel(panel: ChannelPanel) -> str:
    counts = panel_counts(panel)
    points = list(zip(*panel.activation, strict=True))
    clouds = [
        Cloud(color, [point for point, kept in zip(points, panel.kept, strict=True) if kept == kind])
        for kind, _, color in _CHANNEL_KINDS
    ]
    node = f"node {panel.node}" if panel.node else "root"
    picture = scatter(
        clouds,
        label=f"Channels of {panel.group} at the {node}: mean activation under cluster 0 and cluster 1",
        x_title="mean activation, cluster 0",
        y_title="cluster 1",
    )
    shown = sorted(_CHANNEL_KINDS, key=lambda kind: ("shared", "0", "1", "dropped").index(kind[0]))
    key = [(f"{name} {counts[kind]}", color, False) for kind, name, color in shown if counts[kind]]
    return (
        tag("h3", f"{escape(node.capitalize())} · {escape(panel.group)}")
        + legend(key)
        + (picture or empty("All activations of this group are missing or not finite."))
    )


def curves(data: ReportData) -> str:
    if not any(curve.epochs for curve in data.curves):
        return empty(
            "No training was recorded. <code>sigmab finetune</code> writes the log that is drawn here."
        )
    names = data.tree.leaves if data.tree else data.leaves.leaves if data.leaves else ()
    cards = [
        _metric(data.curves, "val_accuracy", "Validation accuracy", percent=True),
        _metric(data.curves, "train_loss", "Training loss"),
        _metric(data.curves, "balance", "Balance of the leaves", bounds=(0.0, 1.0)),
        *(_share_curves(curve, names) for curve in data.curves),
    ]
    about = (
        "One point per epoch. Loss is each run's own: the tree's holds routing terms that a single network does "
        "not have, so losses are not comparable across networks."
    )
    shown = [tag("div", card, cls="card") for card in cards if card]
    return tag("p", about, cls="about") + tag("div", *shown, cls="grid pairs")


def _metric(
    runs: Sequence[Curve],
    metric: str,
    title: str,
    *,
    percent: bool = False,
    bounds: tuple[float, float] | None = None,
) -> str:
    """Fine-tuning runs as lines; the dense network's last accuracy as a level."""
    recorded = [curve for curve in runs if last_value(curve.values.get(metric, ())) is not None]
    lines = [
        Line(curve.name, f"var(--{curve.role})", curve.epochs, curve.values[metric])
        for curve in recorded
        if curve.role != "dense"
    ]
    levels = [
        Level("dense, at its end", "var(--dense)", final)
        for curve in recorded
        if curve.role == "dense" and metric == "val_accuracy"
        if (final := last_value(curve.values[metric])) is not None
    ]
    picture = line_chart(lines, label=f"{title} per epoch", levels=levels, percent=percent, bounds=bounds)
    if not picture:
        return ""
    key = [(line.name, line.color, False) for line in lines]
    key += [(level.name, level.color, True) for level in levels]
    return tag("h3", title) + legend(key) + picture


def _share_curves(curve: Curve, names: Sequence[str]) -> str:
    """Leaf shares per epoch of a tree's fine-tuning; ``names`` are the leaf paths where known."""
    records = curve.values.get("leaf_shares", [])
    count = max((len(record) for record in records if record), default=0)
    lines = [
        Line(
            names[index] if len(names) == count else f"leaf {index}",
            leaf_color(index, count),
            curve.epochs,
            [record[index] if record and index < len(record) else None for record in records],
        )
        for index in range(count)
    ]
    picture = line_chart(lines, label=f"Leaf shares of {curve.name} per epoch", percent=True)
    if not picture:
        return ""
    key = [(line.name, line.color, False) for line in lines]
    return tag("h3", "Leaf shares in training") + legend(key) + picture


_TERMS = {
    "Active parameters": "Weights that one input reads: backbone, the routers and projections on its way, the "
    "specializers and the head of its leaf. For a tree the largest path is printed.",
    "Stored parameters": "All weights that are kept. A tree stores more than one path, and often more than the "
    "dense network: the gain is in what is read, not in what is kept.",
    "MACs": "Multiply-accumulates of convolutions and matrix products for one sample, on the largest path. "
    "Element-wise work and normalisation are not counted.",
    "Bytes": "Parameters and buffers at the precision in which the network was measured: counted, not traffic "
    "measured on a device.",
    "Static twin": "One path of the tree's shape, cut from the same dense network by the same statistics without "
    "clusters, and trained with the same steps. A tree that does not beat it gains nothing by routing.",
    "Leaf share": "Part of the held-out samples that hard routing sends to a leaf.",
    "Balance": "Entropy of the leaf shares over its maximum, ln of the number of leaves: 1 is an even split, 0 is "
    "one leaf for everything.",
    "Shared and specific channels": "A branch keeps some dense channels that its sibling keeps too (active under "
    "both clusters) and some of its own (more active under its cluster than under the other).",
}


def terms(data: ReportData) -> str:
    notes = [tag("li", escape(note)) for note in data.notes]
    entries = [tag("div", tag("dt", term), tag("dd", escape(text))) for term, text in _TERMS.items()]
    known = tag("div", tag("dl", *entries, cls="terms"), cls="card")
    return (tag("ul", *notes, cls="notes") if notes else "") + known


def origin(data: ReportData) -> str:
    entries = dict(data.provenance)
    command = entries.pop("command", "")
    rows = [
        tag("tr", tag("th", escape(key), scope="row"), tag("td", escape(text)))
        for key, text in entries.items()
    ]
    shown = tag("pre", escape(command), tabindex="0") if command else ""
    table = tag("div", tag("table", tag("tbody", *rows), cls="origin"), cls="card") if rows else ""
    return shown + table or empty("The command and the versions were not recorded.")
