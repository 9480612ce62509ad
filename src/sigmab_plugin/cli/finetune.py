"""``sigmab finetune``: train a saved tree, and with the same steps its static twin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import (
    VALIDATION_FRACTION,
    add_folder_options,
    open_data,
    positive,
    read_json,
    working_device,
)

if TYPE_CHECKING:
    from ..data import Dataset
    from ..tuning import TrainRecipe


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "finetune",
        help="fine-tune a saved network",
        description="Fine-tunes a saved tree with soft routing (eq. 8 of arXiv 2606.09924) and saves it to --out. "
        "Started again with the same options it resumes after the last whole epoch. A static twin in the folder is "
        "trained with the same steps. Several processes: torchrun --nproc-per-node N -m sigmab_plugin finetune ...",
        epilog="example: sigmab finetune runs/tree --data cifar100.zip --recipe cifar100 --distill 1 --out runs/tuned",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the trained network is saved"
    )
    add_folder_options(parser, data_required=True, split="train")
    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe",
        default="default",
        metavar="NAME|FILE.json",
        help="default (imagenet, rates and decay by level for the tree), imagenet, cifar100, modelnet40, or a JSON "
        "file of the recipe's fields",
    )
    group.add_argument("--epochs", type=positive, metavar="N", help="epochs (default: the recipe's)")
    group.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="peak learning rate (default: the recipe's; of a named one with sgd in proportion to --batch-size)",
    )
    group.add_argument(
        "--distill",
        type=float,
        metavar="W",
        help="weight of the dense network's logits as teacher (needs its weights)",
    )
    group.add_argument(
        "--val-fraction",
        type=float,
        default=VALIDATION_FRACTION,
        metavar="F",
        help="share of the training split held back for validation each epoch "
        f"(default {VALIDATION_FRACTION}; 0: none)",
    )
    group.add_argument(
        "--keep", choices=("last", "best"), default="last", help="epoch that is saved (default last)"
    )
    group.add_argument("--no-twin", action="store_true", help="leave a static twin untrained and behind")
    return parser


def run(args: argparse.Namespace) -> None:
    with working_device(args) as device:
        train(args, device)


def train(args: argparse.Namespace, device: Any) -> None:
    from ..data import Loader, Subset
    from ..report.provenance import provenance
    from ..tuning import finetune, load_weights
    from ..tuning.distributed import is_main, rank, world_size
    from .folder import (
        LOGS,
        TWIN,
        TWIN_LOGS,
        open_dense,
        open_net,
        open_twin,
        read_record,
        save_net,
        save_twin,
    )
    from .measure import Measured, check_fit, collect, command_line, example_of, say, show, shows_progress

    if args.keep == "best" and not args.val_fraction:
        raise ConfigError("--keep best needs validation; give --val-fraction above 0")
    recipe = read_recipe(args)
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a file; name a folder")
    record = read_record(args.folder, args)
    net = open_net(args.folder, record, device)
    dense = open_dense(record, device)
    if args.distill and dense is None:
        raise ConfigError("--distill needs the dense network's weights; give --weights")
    samples, validation = split_data(open_data(args), args)
    example = example_of(samples, device)
    check_fit(net, example, len(samples.classes), args.data)
    twin = None if args.no_twin else open_twin(args.folder, record, net, example, device)
    size = max(1, args.batch_size // world_size())
    batches = Loader(
        samples,
        batch_size=size,
        shuffle=True,
        seed=args.seed,
        drop_last=True,
        rank=rank(),
        world_size=world_size(),
    )
    held_out = None
    if validation is not None:
        # Every sample on exactly one rank: a padded share would count some twice.
        own = Subset(validation, range(rank(), len(validation), world_size()))
        held_out = Loader(own, batch_size=size)
    networks = [] if dense is None else [Measured("dense", "dense", dense)]
    for name, role, module, stem in (
        ("SigmaB", "sigmab", net, "log"),
        ("static twin", "twin", twin, "twin-log"),
    ):
        if module is None:
            continue
        say(
            args,
            f"{name}: {args.epochs or recipe.epochs} epochs over {len(samples):,} samples in batches of "
            f"{args.batch_size} at a learning rate of {recipe.lr:g}",
        )
        checkpoints = args.out / "checkpoints" / role
        history = finetune(
            module,
            batches,
            epochs=args.epochs,
            recipe=recipe,
            val_loader=held_out,
            teacher=dense if args.distill else None,
            device=device,
            checkpoint_dir=checkpoints,
            log=args.out / stem,
            progress=shows_progress(args),
            seed=args.seed,
        )
        if args.keep == "best":
            load_weights(checkpoints / "best.safetensors", module)
        networks.append(Measured(name, role, module.eval(), history=history))
    if not is_main():
        return
    save_net(args.out, net, of=args.folder, keep=LOGS if twin is None else (*LOGS, TWIN, *TWIN_LOGS))
    record.write(args.out)
    twin_file = None if twin is None else save_twin(args.out, twin)
    for network in networks:
        if network.history is not None and network.history.last.val_accuracy is not None:
            accuracy = network.history.last.val_accuracy
            say(args, f"{network.name}: validation accuracy {accuracy:.2%} after the last epoch")
    report = collect(
        networks,
        example=example,
        classes=samples.classes,
        title=record.model,
        facts={},
        origin=provenance(command_line(args)),
    )
    show(args, report, network=args.out, twin=twin_file)


def read_recipe(args: argparse.Namespace) -> TrainRecipe:
    """``--recipe`` with what ``--lr`` and ``--distill`` replace."""
    from ..tuning.recipe import TrainRecipe, as_recipe

    if args.recipe.endswith(".json"):
        content = read_json(args.recipe)
        if not isinstance(content, dict):
            raise ConfigError(f'{args.recipe}: a recipe is a JSON object, for example {{"lr": 0.05}}')
        recipe = TrainRecipe.from_dict(content)
    else:
        recipe = as_recipe(args.recipe)
        recipe = recipe.fitted(args.epochs or recipe.epochs).for_batches(args.batch_size)
    changes = {"lr": args.lr, "distillation_weight": args.distill}
    return recipe.replace(**{key: value for key, value in changes.items() if value is not None})


def split_data(data: Dataset, args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    from ..data import split_validation

    if not args.val_fraction:
        return data, None
    return split_validation(data, fraction=args.val_fraction, seed=args.seed)
