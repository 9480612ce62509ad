"""``sigmab demo``: the whole way on scikit-learn's digits, real data that needs no download."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from .options import add_run_options, pick_device, positive

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


def run(args: argparse.Namespace) -> None:
    import copy

    from .. import data
    from ..hosts.torch_pruning import SigmaBPruner
    from ..models.resnet import Bottleneck, ResNet
    from ..report import write_report
    from ..report.provenance import provenance
    from ..tree import save, static_twin
    from ..tuning import TrainRecipe, evaluate, finetune
    from .measure import Measured, collect, command_line, example_of, say, show, shows_progress

    started = time.perf_counter()
    device = pick_device(args)
    dense_epochs, epochs = (2, 2) if args.quick else (args.dense_epochs, args.epochs)
    train, validation, test = (data.digits(split) for split in ("train", "val", "test"))
    batches = data.make_loader(train, batch_size=64, shuffle=True, seed=args.seed)
    calibration = data.make_loader(train, batch_size=256)
    held_out = {
        "val": data.make_loader(validation, batch_size=256),
        "test": data.make_loader(test, batch_size=256),
    }
    recipe = TrainRecipe(lr=0.05, batch_size=64, warmup_epochs=1.0, label_smoothing=0.0)
    common: dict[str, Any] = {
        "val_loader": held_out["val"],
        "device": device,
        "progress": shows_progress(args),
        "seed": args.seed,
    }

    say(args, f"dense network: {dense_epochs} epochs")
    dense = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, stem="cifar", width=WIDTH, in_channels=1)
    dense_history = finetune(dense, batches, epochs=dense_epochs, recipe=recipe, **common)
    dense.eval()

    say(args, f"restructuring at {', '.join(LEVELS)}")
    example = example_of(train, device)
    options: dict[str, Any] = {"levels": list(LEVELS), "head": HEAD, "projection_dim": 32, "seed": args.seed}
    inputs = [batch.to(device) for batch, _ in calibration]
    net = SigmaBPruner(dense, example, calibration_data=inputs, **options).step()
    twin = static_twin(dense, example, calibration_data=inputs, config=net.config)

    networks = [Measured("dense", "dense", dense, evaluate(dense, held_out["test"]), dense_history)]
    # Above this rate the routers of a network this small swing, and leaves starve.
    tuning = recipe.replace(lr=0.02, distillation_weight=1.0)
    for name, role, network in (("SigmaB", "sigmab", net), ("static twin", "twin", twin)):
        say(args, f"{name}: {epochs} epochs, the dense network as teacher")
        history = finetune(
            network, batches, epochs=epochs, recipe=tuning, teacher=copy.deepcopy(dense), **common
        )
        networks.append(Measured(name, role, network, evaluate(network, held_out["test"]), history))
    save(net, args.out / "net")

    report = collect(
        networks,
        example=example,
        classes=[f"digit {name}" for name in test.classes],
        title="Handwritten digits on a tree of four leaves",
        summary=f"A bottleneck ResNet trained on scikit-learn's 8×8 digits, branched at {' and '.join(LEVELS)} and "
        f"fine-tuned for {epochs} epochs with the dense network as teacher; its static twin had the same steps.",
        facts={
            "Model": f"bottleneck ResNet, width {WIDTH:g}",
            "Data": f"digits: {len(train):,} train, {len(validation)} validation, {len(test)} test",
            "Device": str(device),
            "Seed": str(args.seed),
        },
        origin=provenance(
            command_line(args),
            seed=args.seed,
            wall_time=f"{time.perf_counter() - started:.0f} s, training included",
            recipe=", ".join(
                f"{key} {value}" for key, value in tuning.to_dict().items() if key != "algorithm"
            ),
        ),
        notes=(
            f"One run with one seed on {len(test)} test images: one image is {100 / len(test):.2f} pp, so differences "
            "under about a percentage point say nothing.",
            "A demonstration at toy size: here routers and projections weigh more than in a real network.",
        ),
    )
    page, record = write_report(args.out / "report.html", report)
    show(args, report, network=args.out / "net", report=page, data=record)
