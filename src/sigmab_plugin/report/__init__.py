"""Tables and the HTML page: what a network costs and gives, beside the dense one and the static twin.

``counts`` measures networks (needs torch); everything else works on plain data.
"""

from __future__ import annotations

from .analysis import leaf_shares, leaf_statistics
from .data import (
    ChannelPanel,
    Curve,
    LeafStatistics,
    ReportData,
    Row,
    Section,
    TreeFigure,
    TreePart,
)
from .html import check_report_path, render, write_report
from .tables import Table, counts_table, rows_to_json

__all__ = [
    "ChannelPanel",
    "Curve",
    "LeafStatistics",
    "ReportData",
    "Row",
    "Section",
    "Table",
    "TreeFigure",
    "TreePart",
    "check_report_path",
    "counts_table",
    "leaf_shares",
    "leaf_statistics",
    "render",
    "rows_to_json",
    "write_report",
]
