"""A small report made by hand, for the tests of tables and pages."""

from __future__ import annotations

from sigmab_plugin.report import (
    ChannelPanel,
    Curve,
    LeafStatistics,
    ReportData,
    Row,
    Section,
    TreeFigure,
    TreePart,
)

LEAVES = ("0/0", "0/1", "1/0", "1/1")

ROWS = (
    Row("dense", "dense", 0.9735, 272_474, 272_474, 30_500_000, 1_095_000, 1_095_000),
    Row("SigmaB", "sigmab", 0.9694, 108_123, 301_231, 21_300_000, 436_000, 1_215_000),
    Row("static twin", "twin", 0.9583, 100_412, 100_412, 21_100_000, 405_000, 405_000),
)


def tree() -> TreeFigure:
    parts = [TreePart("backbone", "", 19_504, 32)]
    parts += [TreePart("router", node, 4_386) for node in ("", "0", "1")]
    parts += [TreePart("specializer", path, 36_880, 45) for path in ("0", "1", *LEAVES)]
    parts += [TreePart("head", leaf, 650) for leaf in LEAVES]
    return TreeFigure(tuple(parts), LEAVES, ("layer3", "layer4"), "fc")


def report() -> ReportData:
    """Every part filled, and names that would break a page that does not escape them."""
    return ReportData(
        title="Tree <of> four & leaves",
        summary='Quoted "summary".',
        facts={"Model": "ResNet <small>"},
        rows=ROWS,
        tree=tree(),
        leaves=LeafStatistics(
            LEAVES, ("cat", "dog & <wolf>", "never"), ((8, 2, 0, 0), (0, 1, 6, 3), (0, 0, 0, 0))
        ),
        channels=(
            ChannelPanel(
                "",
                "layer3.1.conv2",
                ((0.1, 0.9, 0.5, 0.0), (0.9, 0.1, 0.6, 0.0)),
                ("1", "0", "shared", "dropped"),
            ),
        ),
        curves=(
            Curve("dense", "dense", (1, 2), {"val_accuracy": [0.8, 0.9], "train_loss": [1.0, 0.5]}),
            Curve(
                "SigmaB",
                "sigmab",
                (1, 2),
                {
                    "val_accuracy": [0.7, 0.88],
                    "train_loss": [2.0, None],
                    "balance": [0.8, 0.9],
                    "leaf_shares": [[0.4, 0.2, 0.2, 0.2], [0.3, 0.2, 0.3, 0.2]],
                },
            ),
        ),
        provenance={"command": "sigmab demo --out 'a <b>'", "seed": "0"},
        notes=("One <run> only.",),
        sections=(Section("Bytes & bus", "<p>extra part</p>"),),
    )
