"""``sigmab evaluate``: accuracy, sizes and leaf shares of a saved network, beside the dense one and the twin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import add_folder_options, open_data, pick_device, split_of


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "evaluate",
        help="accuracy, sizes and leaf shares of a saved network",
        description="Evaluates a saved tree with hard routing on held-out data, beside the dense model (where its "
        "weights are known) and the static twin (where the folder has one). Other networks that compress has saved are "
        "evaluated beside the dense model.",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE.html", help="write the HTML report, and its data as JSON"
    )
    add_folder_options(parser, data_required=True, split="test")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..data import Loader
    from ..hosts.nncf_folder import is_tree
    from ..report import check_report_path, write_report
    from ..report.provenance import provenance
    from ..tuning import evaluate
    from .folder import LOG, TWIN_LOG, open_dense, open_net, open_other, open_twin, read_record
    from .measure import Measured, check_fit, collect, command_line, example_of, read_history, say, show

    if args.report:
        check_report_path(args.report)  # before the work, not after it
    record = read_record(args.folder, args)
    device = pick_device(args)
    data = open_data(args)
    example = example_of(data, device)
    tree = is_tree(args.folder)
    net: Any = (
        open_net(args.folder, record, device) if tree else open_other(args.folder, record, example, device)
    )
    check_fit(net, example, len(data.classes), args.data)
    twin = open_twin(args.folder, record, net, example, device) if tree else None
    loader = Loader(data, batch_size=args.batch_size)
    networks = []
    for name, role, module, log in (
        ("dense", "dense", open_dense(record, device), None),
        ("SigmaB" if tree else "compressed", "sigmab" if tree else "other", net, args.folder / LOG),
        ("static twin", "twin", twin, args.folder / TWIN_LOG),
    ):
        if module is None:
            continue
        say(args, f"{name}: {len(data):,} samples")
        networks.append(Measured(name, role, module, evaluate(module, loader), read_history(log)))
    report = collect(
        networks,
        example=example,
        classes=data.classes,
        title=f"{record.model.rpartition(':')[2]} on {Path(args.data).name}",
        facts={
            "Model": record.model,
            "Data": f"{Path(args.data).name}, {split_of(args) or 'all of it, which has no splits'}: "
            f"{len(data):,} samples",
            "Device": str(device),
        },
        origin=provenance(
            command_line(args),
            restructured_by=" ".join(["sigmab", *record.command]) if record.command else None,
            dense_weights=record.weights,
        ),
        notes=["The dense network's weights are not known, so it has no row."]
        if record.weights is None
        else (),
    )
    page, numbers = write_report(args.report, report) if args.report else (None, None)
    show(args, report, report=page, data=numbers)
