"""``sigmab demo``: the whole way on scikit-learn's digits, real data that needs no download."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_run_options, pick_device, positive

if TYPE_CHECKING:
    from torch import nn

    from ..report import ReportData
    from .measure import Measured

#: Modules at which the demo's network branches, and where its leaf heads start.
LEVELS, HEAD = ("layer3", "layer4"), "fc"

#: Share of ResNet-50's channels: small enough that the whole demo takes about a minute on one core.
WIDTH = 0.125


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="train, restructure and fine-tune a small network on scikit-learn's digits",
        description="Trains a small bottleneck ResNet on scikit-learn's digits (1,797 real images, offline), "
        "restructures it with SigmaBPruner, fine-tunes the tree and its static twin with the dense network as teacher, "
        "evaluates all three on held-out digits, saves the tree and writes an HTML report.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where to write (default runs/demo)",
    )
    parser.add_argument(
        "--dense-epochs", type=positive, default=20, metavar="N", help="epochs of the dense network"
    )
    parser.add_argument(
        "--epochs", type=positive, default=20, metavar="N", help="epochs of fine-tuning, tree and twin alike"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two epochs of each: shows that it runs, no more",
    )
    add_run_options(parser)
    # Layers this small gain nothing from threads, and lose much where other work shares the processors.
    parser.set_defaults(threads=1)
    return parser


def demo_network() -> nn.Module:
    """The demo's dense network: a narrow ResNet of four bottlenecks for (B, 1, 8, 8) images, ten classes."""
    from ..models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, stem="cifar", width=WIDTH, in_channels=1)


def run(args: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from ..report import write_report
    from .folder import LOGS, TWIN, TWIN_LOGS, Record, save_net, save_twin
    from .measure import command_line, show

    started = time.perf_counter()
    device = pick_device(args)
    if args.quick:
        args.dense_epochs = args.epochs = 2
    networks = train(args, device)
    dense, net, twin = (network.module for network in networks)
    save_net(args.out, net, keep=(TWIN, *LOGS, *TWIN_LOGS))  # type: ignore[arg-type]
    weights = args.out / "dense.safetensors"
    save_file(dense.state_dict(), weights)
    save_twin(args.out, twin)
    Record(f"{__name__}:demo_network", {}, str(weights.resolve()), tuple(args.argv)).write(args.out)
    data = describe(args, networks, device, time.perf_counter() - started)
    page, _ = write_report(args.out / "report.html", data)
    show(args, data, network=args.out, report=page)
    if not args.json:
        again = [*command_line(args)[:1], "evaluate", str(args.out), "--data", "digits"]
        print(f"\nlook again: {shlex.join(again)}")


def train(args: argparse.Namespace, device: Any) -> list[Measured]:
    """The dense network, the tree and the twin, trained, and evaluated on the test digits."""
    from .. import data
    from ..hosts.torch_pruning import SigmaBPruner
    from ..tree import static_twin
    from ..tuning import TrainRecipe, evaluate, finetune
    from .folder import LOG, TWIN_LOG
    from .measure import Measured, example_of, say, shows_progress

    digits = data.digits("train")
    batches = data.Loader(digits, batch_size=64, shuffle=True, seed=args.seed)
    test = data.Loader(data.digits("test"), batch_size=256)
    common: dict[str, Any] = {
        "val_loader": data.Loader(data.digits("val"), batch_size=256),
        "device": device,
        "progress": shows_progress(args),
        "seed": args.seed,
    }
    recipe = TrainRecipe(lr=0.05, batch_size=64, warmup_epochs=1.0, label_smoothing=0.0)
    say(args, f"dense network: {args.dense_epochs} epochs")
    dense = demo_network()
    history = finetune(dense, batches, epochs=args.dense_epochs, recipe=recipe, **common)
    networks = [Measured("dense", "dense", dense.eval(), evaluate(dense, test), history)]

    say(args, f"restructuring at {', '.join(LEVELS)}")
    example = example_of(digits, device)
    calibration = [inputs.to(device) for inputs, _ in data.Loader(digits, batch_size=256)]
    options: dict[str, Any] = {"levels": list(LEVELS), "head": HEAD, "projection_dim": 32, "seed": args.seed}
    net = SigmaBPruner(dense, example, calibration_data=calibration, **options).step()
    twin = static_twin(dense, example, calibration_data=calibration, config=net.config)

    # Above this rate the routers of a network this small swing, and leaves starve.
    recipe = recipe.replace(lr=0.02, distillation_weight=1.0)
    for name, role, module, log in (("SigmaB", "sigmab", net, LOG), ("static twin", "twin", twin, TWIN_LOG)):
        say(args, f"{name}: {args.epochs} epochs, the dense network as teacher")
        history = finetune(
            module, batches, epochs=args.epochs, recipe=recipe, teacher=dense, log=args.out / log, **common
        )
        networks.append(Measured(name, role, module.eval(), evaluate(module, test), history))
    return networks


def describe(args: argparse.Namespace, networks: list[Measured], device: Any, seconds: float) -> ReportData:
    from .. import data
    from ..report.provenance import provenance
    from .measure import collect, command_line, example_of

    parts = {split: data.digits(split) for split in ("train", "val", "test")}
    images = len(parts["test"])
    return collect(
        networks,
        example=example_of(parts["test"], device),
        classes=[f"digit {name}" for name in parts["test"].classes],
        title="Handwritten digits on a tree of four leaves",
        summary=f"A bottleneck ResNet trained on scikit-learn's 8×8 digits, branched at {' and '.join(LEVELS)} and "
        f"fine-tuned for {args.epochs} epochs with the dense network as teacher; its static twin had the same steps.",
        facts={
            "Model": f"bottleneck ResNet, width {WIDTH:g}",
            "Data": f"digits: {len(parts['train']):,} train, {len(parts['val'])} validation, {images} test",
            "Device": str(device),
            "Seed": str(args.seed),
        },
        origin=provenance(
            command_line(args), seed=args.seed, wall_time=f"{seconds:.0f} s, training included"
        ),
        notes=(
            f"One run with one seed on {images} test images: one image is {100 / images:.2f} pp, so differences "
            "under about a percentage point say nothing.",
            "A demonstration at toy size: here routers and projections weigh more than in a real network.",
        ),
    )
