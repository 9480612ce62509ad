"""``sigmab export``: a saved network as a bundle with one artefact per node, or as a single file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import add_folder_options, open_data, pick_device, positive

if TYPE_CHECKING:
    from ..deploy import Manifest


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "export",
        help="write a saved network for a runtime",
        description="Writes a saved tree for deployment: a bundle with one artefact per node, which "
        "sigmab_plugin.deploy.Runner runs reading only the path an input takes, or one file with nested branches.",
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="directory of the bundle, or the single file"
    )
    parser.add_argument(
        "--format",
        default="onnx",
        choices=("onnx", "openvino", "torch", "executorch"),
        help="runtime (default onnx)",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "fp16", "int8", "int8-weights", "int4-weights", "legonet"),
        help="how weights are stored (default fp32); int8 also quantizes activations and calibrates on --data; "
        "legonet stores the indices of --legonet",
    )
    parser.add_argument(
        "--legonet", type=Path, metavar="FILE", help="packed weights of the network, for --precision legonet"
    )
    parser.add_argument(
        "--layout",
        default="portable",
        choices=("portable", "native"),
        help="native: weights laid out for this machine, refused on others (onnx only)",
    )
    parser.add_argument("--packed", action="store_true", help="one weights file instead of one per node")
    parser.add_argument(
        "--single-file", action="store_true", help="one model with nested branches, for batches of one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle or a file that exists")
    parser.add_argument(
        "--input-shape",
        metavar="N,N,...",
        help="shape of one sample, for example 3,224,224; instead of --data",
    )
    parser.add_argument(
        "--calibration-batches",
        type=positive,
        default=8,
        metavar="N",
        help="batches used for int8 (default 8)",
    )
    add_folder_options(parser, data_required=False, split="train")
    return parser


def run(args: argparse.Namespace) -> None:
    from itertools import islice

    import torch

    from ..deploy import export, export_single_file
    from .folder import open_net, read_record

    if (args.data is None) == (args.input_shape is None):
        raise ConfigError("give one of --data and --input-shape: the export needs an example input")
    if args.precision == "int8" and args.data is None:
        raise ConfigError("--precision int8 calibrates on real inputs: give --data")
    if (args.precision == "legonet") != (args.legonet is not None):
        raise ConfigError("--precision legonet and --legonet FILE go together")
    if args.single_file and (args.precision != "fp32" or args.layout != "portable" or args.packed):
        raise ConfigError(
            "--single-file is float32 and portable: leave out --precision, --layout and --packed"
        )
    record = read_record(args.folder, args)
    pick_device(args)
    net: Any = open_net(args.folder, record, torch.device("cpu"))
    packed = None
    if args.legonet is not None:
        from ..techniques.legonet import expand_into, read_packed

        packed = read_packed(args.legonet)
        net = expand_into(packed, net)
    calibration: list[Any] | None = None
    if args.data is None:
        try:
            shape = [int(n) for n in args.input_shape.split(",")]
            if min(shape) < 1:
                raise ValueError(args.input_shape)
        except ValueError as error:
            raise ConfigError(
                f"--input-shape is numbers above 0 and commas, such as 3,224,224; got {args.input_shape!r}"
            ) from error
        example = torch.randn(2, *shape)
    else:
        from ..data import Loader

        batches = Loader(open_data(args), batch_size=args.batch_size)
        calibration = [batch[0] for batch in islice(batches, args.calibration_batches)]
        example = calibration[0]
        if torch.is_tensor(example):
            example = example[:2]
    if args.single_file:
        written = export_single_file(net, example, args.to, format=args.format, overwrite=args.overwrite)
        if args.json:
            print(json.dumps({"file": str(written)}))
        return
    manifest = export(
        net,
        example,
        args.to,
        format=args.format,
        precision=args.precision,
        layout=args.layout,
        calibration_data=calibration if args.precision == "int8" else None,
        codebook=packed,
        packed=args.packed,
        overwrite=args.overwrite,
    )
    _show(args, manifest)


def _show(args: argparse.Namespace, manifest: Manifest) -> None:
    sizes = manifest.path_bytes()
    if args.json:
        print(json.dumps({"bundle": str(args.to), "format": manifest.format, "path_bytes": sizes}))
        return
    if args.quiet:
        return
    rows = [
        (node.path or "root", node.role, f"{node.parameters:,}", f"{node.weights.nbytes:,}")
        for node in manifest.nodes
    ]
    head = ("node", "role", "parameters", "bytes")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
    for row in (head, *rows):
        print("  ".join(row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(4)))
    print(f"largest path: {max(sizes.values()):,} bytes of {sum(n.weights.nbytes for n in manifest.nodes):,}")
