"""``sigmab compress``: restructure a pretrained network into a SigmaB tree."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .compress_file import carry_out, lists_more_than_the_tree
from .options import (
    add_data_options,
    add_model_options,
    add_run_options,
    load_model,
    open_data,
    positive,
    read_sections,
    working_device,
)

if TYPE_CHECKING:
    from ..config import SigmaBConfig


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compress",
        help="restructure a pretrained network into a tree",
        description="Restructures a dense model into a SigmaB tree and saves it. The data is read once per level, "
        "for clustering and channel statistics; labels are not used. A config file may list NNCF's algorithms beside "
        "the tree; the installed NNCF (2.x or 3.x) carries it out, section by section.",
        epilog="example: sigmab compress --model cifar_resnet50 --weights dense.safetensors --data cifar100.zip "
        "--preset resnet50 --out runs/tree",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the network is saved")
    add_model_options(parser, required=True)
    add_data_options(parser, required=True, split="train")
    group = parser.add_argument_group("tree")
    group.add_argument(
        "--config",
        metavar="FILE",
        help='JSON: NNCF-style with "compression", or one section with "algorithm": "sigmab"',
    )
    group.add_argument("--preset", choices=("resnet50", "pointnet2"), help="a published tree")
    group.add_argument(
        "--levels", nargs="+", metavar="MODULE", help="modules at which the tree branches, in order"
    )
    group.add_argument("--head", metavar="MODULE", help="module at which the classifier starts")
    group.add_argument(
        "--active-ratio", type=float, metavar="R", help="solve the widths for this share of parameters"
    )
    group.add_argument(
        "--projection-dim", type=int, metavar="D", help="size of the routers' latents (default 128)"
    )
    group.add_argument(
        "--repair",
        choices=("none", "least_squares"),
        help="least_squares: fit the sliced layers to the dense ones' outputs; no labels, no training",
    )
    group.add_argument("--samples", type=positive, metavar="N", help="read at most N samples (default: all)")
    group.add_argument(
        "--twin", action="store_true", help="also build the static twin, the control beside the tree"
    )
    add_run_options(parser)
    parser.set_defaults(
        seed=None
    )  # so that a seed of 0 can be told from none, which leaves a file's as it is
    return parser


def run(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a file; name a folder")
    with working_device(args) as device:
        restructure(args, device)


def restructure(args: argparse.Namespace, device: Any) -> None:
    if lists_more_than_the_tree(args):
        carry_out(args, device)
        return
    from ..hosts.torch_pruning import SigmaBPruner
    from ..tree import static_twin
    from ..tuning.distributed import is_main
    from .calibration import Calibration
    from .folder import TWIN, record_of, save_net, save_twin
    from .measure import Measured, SampleCounter, check_fit, collect, command_line, example_of, say, show

    config = read_config(args)
    model = load_model(args).to(device)
    data = open_data(args)
    example = example_of(data, device)
    check_fit(model, example, len(data.classes), args.data)
    batches = Calibration(data, args, device)
    say(args, f"restructuring at {', '.join(config.levels)} over {batches.samples:,} samples")
    counter = SampleCounter(args, len(batches.order))
    net = SigmaBPruner(model, example, calibration_data=batches, config=config, progress=counter).step()
    networks = [Measured("dense", "dense", model), Measured("SigmaB", "sigmab", net)]
    twin = None
    if args.twin:
        twin = static_twin(model, example, config=config, calibration_data=batches)
        networks.append(Measured("static twin", "twin", twin))
    if not is_main():
        return
    save_net(args.out, net, keep=() if twin is None else (TWIN,))
    record_of(args).write(args.out)
    report = collect(
        networks,
        example=example,
        classes=data.classes,
        title=args.model,
        facts={},
        origin={"command": " ".join(command_line(args))},
    )
    show(args, report, network=args.out, twin=None if twin is None else save_twin(args.out, twin))


def read_config(args: argparse.Namespace) -> SigmaBConfig:
    """The tree's configuration: ``--config`` or ``--preset``, then the options that change single fields.

    Raises:
        ConfigError: no tree is described, or more than one.
    """
    from ..config import SigmaBConfig

    if args.config and args.preset:
        raise ConfigError("give --config or --preset, not both")
    config = SigmaBConfig()
    if args.preset:
        config = SigmaBConfig.preset(args.preset)
    if args.config:
        sections, _ = read_sections(args.config)
        if len(sections) > 1:
            raise ConfigError(f"{args.config}: one sigmab section is enough, there are {len(sections)}")
        config = SigmaBConfig.from_dict(sections[0])
    given = {
        "levels": tuple(args.levels) if args.levels else None,
        "head": args.head,
        "active_ratio": args.active_ratio,
        "projection_dim": args.projection_dim,
        "repair": args.repair,
        "seed": args.seed,
    }
    config = config.replace(**{key: value for key, value in given.items() if value is not None})
    if not config.levels or not config.head:
        raise ConfigError(
            'which tree? give --levels and --head, --preset, or --config with "levels" and "head"'
        )
    return config
