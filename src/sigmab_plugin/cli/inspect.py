"""``sigmab inspect``: the tree, widths and sizes of a saved network, read from its files alone."""

from __future__ import annotations

import argparse
import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import add_output_options

if TYPE_CHECKING:
    from ..tree.plan import Plan

#: State of BatchNorm, which is stored but no parameter.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="tree, widths and sizes of a saved network",
        description="Prints what a saved tree is made of. Neither the dense model nor data is needed.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what compress, finetune or save wrote")
    add_output_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ConfigError(f"no such folder: {args.folder}; give what `sigmab compress --out` wrote")
    from ..tree import read_plan
    from .folder import check_tree

    check_tree(args.folder)
    plan = read_plan(args.folder)
    nodes = describe(plan, stored_sizes(args.folder))
    paths = {leaf: path_size(plan, nodes, leaf) for leaf in plan.leaves}
    if args.json:
        record = {
            "config": plan.config.to_dict(),
            "leaves": list(plan.leaves),
            "nodes": nodes,
            "paths": paths,
        }
        print(json.dumps(record, indent=1))
        return
    print_tree(plan, nodes, paths)


def stored_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Values and bytes of every module of the net ("heads.0_1"), from the header of its weights.

    Values are parameters, and the buffers that are not BatchNorm's: the file does not tell these two apart.

    Raises:
        FormatError: the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from ..errors import FormatError
    from ..tree.io import WEIGHTS

    sizes: dict[str, tuple[int, int]] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                own = prod(part.get_shape())
                module = ".".join(name.split(".")[: 1 if name.startswith("backbone.") else 2])
                values, size = sizes.get(module, (0, 0))
                is_buffer = name.endswith(_BUFFERS)
                sizes[module] = (
                    values + (0 if is_buffer else own),
                    size + own * _ITEM_BYTES[part.get_dtype()],
                )
    except FileNotFoundError as error:
        raise FormatError(f"no {WEIGHTS} in {folder}") from error
    except SafetensorError as error:
        raise FormatError(f"{folder / WEIGHTS} is truncated or altered: {error}") from error
    return sizes


_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
    "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def describe(plan: Plan, sizes: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """One record per module of the tree, from the backbone down, depth first."""
    from ..tree.plan import child, module_key

    nodes: list[dict[str, Any]] = []

    def add(kind: str, path: str, module: str, **more: Any) -> None:
        values, size = sizes.get(module, (0, 0))
        nodes.append({"kind": kind, "path": path, "values": values, "bytes": size, **more})

    def visit(path: str, depth: int) -> None:
        key = module_key(path)
        if path:
            parent, _, branch = path.rpartition("/")
            add(
                "specializer",
                path,
                f"specializers.{key}",
                dense_module=plan.config.levels[depth - 1] if plan.config.levels else f"segment {depth}",
                width=plan.feature_width(path),
                calibration_samples=plan.splits[parent].samples[int(branch)],
            )
        if depth == plan.depth:
            add("head", path, f"heads.{key}", dense_module=plan.config.head or "last segment")
            return
        add("router", path, f"routers.{key}", width=plan.config.projection_dim)
        for number in (0, 1):
            visit(child(path, number), depth + 1)

    add("backbone", "", "backbone", width=plan.feature_width(""))
    visit("", 0)
    return nodes


def path_size(plan: Plan, nodes: list[dict[str, Any]], leaf: str) -> dict[str, int]:
    """Values and bytes that an input of ``leaf`` reads."""
    from ..tree.plan import prefixes

    above = {"", *prefixes(leaf)}
    used = [node for node in nodes if node["path"] in above]
    return {key: sum(node[key] for node in used) for key in ("values", "bytes")}


def print_tree(plan: Plan, nodes: list[dict[str, Any]], paths: dict[str, dict[str, int]]) -> None:
    from ..report import Table
    from ..report import format as fmt

    rows = []
    for node in nodes:
        depth = node["path"].count("/") + 1 if node["path"] else 0
        inner = 0 if node["kind"] in ("backbone", "specializer") else 1
        name = node["kind"] if not node["path"] else f"{node['kind']} {node['path']}"
        samples = node.get("calibration_samples")
        rows.append(
            (
                "  " * (depth + inner) + name,
                node.get("dense_module", ""),
                fmt.integer(node["width"]) if "width" in node else "",
                fmt.integer(node["values"]),
                fmt.size(node["bytes"]),
                "" if samples is None else fmt.integer(samples),
            )
        )
    headers = ("node", "dense module", "width", "values", "size", "calibration samples")
    print(Table(headers, tuple(rows), (False, False, True, True, True, True)).text())
    total = {key: sum(node[key] for node in nodes) for key in ("values", "bytes")}
    print()
    summary = [
        (f"path {leaf}", fmt.integer(size["values"]), fmt.size(size["bytes"])) for leaf, size in paths.items()
    ]
    summary.append(("stored", fmt.integer(total["values"]), fmt.size(total["bytes"])))
    print(Table(("read by one input", "values", "size"), tuple(summary), (False, True, True)).text())
    print("\nvalues: parameters, and buffers other than BatchNorm's statistics")
    print("\n" + "  ".join(f"{key} {value}" for key, value in settings(plan).items()))


def settings(plan: Plan) -> dict[str, str]:
    """Options of the plan that are not at their default."""
    usual = type(plan.config)().to_dict()
    own = plan.config.to_dict().items()
    return {key: json.dumps(value) for key, value in own if value != usual[key]}
