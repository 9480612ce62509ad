"""``sigmab compare``: techniques and their combinations on one model and one data set, in one table and plot."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import (
    VALIDATION_FRACTION,
    add_run_options,
    build_model,
    has_splits,
    open_split,
    pick_device,
    read_json,
)

if TYPE_CHECKING:
    from ..data import Dataset, Loader
    from ..tuning import TrainRecipe
    from .comparison import Outcome, Run


#: Keys of the file, with their defaults; a key without a default is required.
DEFAULTS: dict[str, Any] = {
    "title": "",
    "model_args": {},
    "weights": None,
    "image_size": None,
    "train_split": "train",
    "validation_split": None,
    "validation_fraction": VALIDATION_FRACTION,
    "test_split": "test",
    "batch_size": 64,
    "calibration_samples": 2048,
    "finetune": {},
    "epochs": 5,
    "teacher": True,
    "twins": True,
}
REQUIRED = ("model", "data", "runs")
#: Share of data without splits that the accuracy is measured on, and that nothing else sees.
TEST_FRACTION = 0.2
#: Keys of which another value means other rows. The comparison knows the rest by itself, the data by its content.
DECISIVE = (
    "model",
    "model_args",
    "image_size",
    "train_split",
    "validation_split",
    "validation_fraction",
    "test_split",
    "batch_size",
    "calibration_samples",
)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


_TEXT = (_is_text, "a text")
#: What a key's value is, and how to say so.
FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "title": (lambda value: isinstance(value, str), "a text"),
    "model": (_is_text, 'a text such as "cifar_resnet18" or "package.module:callable"'),
    "model_args": (_is_object, 'an object of keyword arguments, such as {"num_classes": 10}'),
    "weights": (lambda value: value is None or _is_text(value), "the path of a file, or null"),
    "data": (_is_text, 'one path, or "digits"; several files are one text with commas between'),
    "image_size": (lambda value: value is None or _is_count(value), "a whole number above 0, or null"),
    "train_split": _TEXT,
    "validation_split": (lambda value: value is None or _is_text(value), "a text, or null"),
    "validation_fraction": (
        lambda value: isinstance(value, float) and 0 < value < 1,
        "a number between 0 and 1",
    ),
    "test_split": _TEXT,
    "batch_size": (_is_count, "a whole number above 0"),
    "calibration_samples": (_is_count, "a whole number above 0"),
    "finetune": (
        _is_object,
        'an object of the recipe\'s fields, such as {"lr": 0.05}; {} is the default recipe',
    ),
    "epochs": (lambda value: _is_count(value, 0), "a whole number, 0 for none"),
    "teacher": (_is_switch, "true or false"),
    "twins": (_is_switch, "true or false"),
    "runs": (
        lambda value: isinstance(value, list) and bool(value),
        "a list of objects with 'name' and 'compression'",
    ),
}
#: A leaf with a smaller share of the test samples is named in the notes.
STARVED = 0.01


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compare",
        help="run techniques and their combinations, and compare them",
        description="Runs lists of techniques on one trained network and writes one table and one plot, accuracy "
        "against active and against stored bytes, into an HTML report. Rows that are finished are kept in --out; "
        "the same command goes on where it stopped.",
        epilog='The file: {"model": ..., "weights": ..., "data": ..., "epochs": 5, "runs": [{"name": "SigmaB", '
        '"compression": [{"algorithm": "sigmab", ...}]}, ...]}. Paths are relative to it. "torch_pruning" is a '
        "section too. Choices are made on the validation split; the test split gives the printed accuracy.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="what to run, as JSON")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/compare"),
        metavar="DIR",
        help="where rows and report are written",
    )
    add_run_options(parser)
    return parser


@dataclass(frozen=True)
class Plan:
    """The file, checked: plain values and the runs."""

    values: dict[str, Any]
    runs: tuple[Run, ...]
    recipe: TrainRecipe
    folder: Path
    names_splits: bool

    def path(self, key: str) -> str | None:
        """A path of the file, relative to the file, each of several data files; names such as ``digits`` stay."""
        value = self.values[key]
        if value is None:
            return None
        if key == "data" and "," in value and not (self.folder / value).exists():
            return ",".join(self._beside(part.strip()) for part in value.split(",") if part.strip())
        return self._beside(value)

    def _beside(self, value: str) -> str:
        beside = self.folder / value
        return str(beside) if beside.exists() else value


def read_plan(file: Path) -> Plan:
    """Read and check the file of ``--config``.

    Raises:
        ConfigError: a missing or unknown key, a value of another type, a run without name or sections, or one split
            for two uses.
    """
    from .comparison import Run

    content = read_json(file)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file}: expected a JSON object with {', '.join(REQUIRED)}")
    for key in REQUIRED:
        if key not in content:
            raise ConfigError(f"{file}: {key!r} is missing; needed are {', '.join(REQUIRED)}")
    known = {*DEFAULTS, *REQUIRED}
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{file}: unknown key {key!r}; {hint}")
        fits, form = FORMS[key]
        if not fits(content[key]):
            raise ConfigError(f"{file}: {key!r} must be {form}; got {_shown(content[key])}")
    runs = []
    for position, run in enumerate(content["runs"]):
        if not isinstance(run, Mapping) or set(run) != {"name", "compression"}:
            raise ConfigError(
                f"{file}: runs[{position}] must be an object with 'name' and 'compression' alone"
            )
        if not _is_text(run["name"]):
            raise ConfigError(f"{file}: runs[{position}]: 'name' must be a text; got {_shown(run['name'])}")
        sections = run["compression"]
        sections = [sections] if isinstance(sections, Mapping) else sections
        if not isinstance(sections, list) or not all(isinstance(section, Mapping) for section in sections):
            raise ConfigError(
                f"{file}: runs[{position}]: 'compression' must be a section or a list of them, such as "
                f'{{"algorithm": "legonet"}}; got {_shown(sections)}'
            )
        runs.append(Run(run["name"], tuple(dict(section) for section in sections)))
    values = {**DEFAULTS, **content}
    splits = ("train_split", "validation_split", "test_split")
    if len({values[key] for key in splits}) < len(splits):
        raise ConfigError(
            f"{file}: {', '.join(splits)} must be three splits; got {', '.join(str(values[key]) for key in splits)}. "
            "What was trained or chosen on gives no test accuracy"
        )
    recipe = read_recipe(values["finetune"], values["epochs"], batch_size=values["batch_size"])
    names_splits = any(content.get(key) is not None for key in splits)
    return Plan(values, tuple(runs), recipe, file.resolve().parent, names_splits)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_recipe(fields: Mapping[str, Any], epochs: int, *, batch_size: int) -> TrainRecipe:
    """The file's recipe; the default one where it has none. Without ``warmup_epochs`` the warm-up fits ``epochs``."""
    from ..tuning.recipe import DEFAULT, TrainRecipe, as_recipe

    recipe = TrainRecipe.from_dict(fields) if fields else as_recipe(DEFAULT)
    if "warmup_epochs" not in fields:
        recipe = recipe.fitted(epochs)
    if "lr" not in fields:
        recipe = recipe.for_batches(batch_size)
    return recipe


def run(args: argparse.Namespace) -> None:
    from .. import data
    from ..hosts.nncf_schema import techniques as installed_techniques
    from ..hosts.torch_pruning_section import technique as torch_pruning
    from .comparison import Comparison
    from .measure import example_of, say

    plan = read_plan(args.config)
    device = pick_device(args)
    values = plan.values
    model = build_model(values["model"], values["model_args"], plan.path("weights")).to(device).eval()
    parts = _splits(plan, seed=args.seed)
    train, size = parts.train, values["batch_size"]
    # BatchNorm cannot train on a last batch of one sample.
    lone = len(train) % size == 1 and len(train) > size

    def loader(dataset: Dataset, *, shuffle: bool = False, drop_last: bool = False) -> Loader:
        return data.Loader(dataset, batch_size=size, shuffle=shuffle, seed=args.seed, drop_last=drop_last)

    comparison = Comparison(
        model=model,
        example=example_of(train, device),
        train=loader(train, shuffle=True, drop_last=lone),
        validation=loader(parts.validation),
        test=loader(parts.test),
        calibration=_calibration(loader(train, shuffle=True), values["calibration_samples"], device),
        techniques={**installed_techniques(), torch_pruning.name: torch_pruning},
        recipe=plan.recipe,
        epochs=values["epochs"],
        directory=args.out,
        teacher=values["teacher"],
        twins=values["twins"],
        seed=args.seed,
        settings={key: values[key] for key in DECISIVE},
        say=lambda text: say(args, text),
    )
    outcomes = comparison.run(plan.runs)
    _write(args, plan, outcomes, parts, device=device)


@dataclass(frozen=True)
class Parts:
    """The data, no sample in two parts. ``test_held_out``: the source has no splits, so the test part is a share."""

    train: Dataset
    validation: Dataset
    test: Dataset
    test_held_out: bool


def _splits(plan: Plan, *, seed: int) -> Parts:
    """Validation is held out of train unless the file names a split; the test part, too, where there are none."""
    from ..data import split_validation

    source, size = str(plan.path("data")), plan.values["image_size"]

    def split(key: str) -> Dataset:
        return open_split(source, plan.values[key], image_size=size)

    fraction = plan.values["validation_fraction"]
    if not plan.names_splits and not has_splits(source):
        whole = open_split(source, None, image_size=size)
        rest, test = split_validation(whole, fraction=TEST_FRACTION, seed=seed)
        return Parts(*split_validation(rest, fraction=fraction, seed=seed), test, test_held_out=True)
    train, named_test = split("train_split"), split("test_split")
    if plan.values["validation_split"]:
        return Parts(train, split("validation_split"), named_test, test_held_out=False)
    return Parts(*split_validation(train, fraction=fraction, seed=seed), named_test, test_held_out=False)


def _calibration(loader: Any, samples: int, device: Any) -> list[Any]:
    """Inputs of the first batches of a shuffled pass, until there are ``samples``."""
    from ..tuning.batches import to_device

    batches, seen = [], 0
    for inputs, targets in loader:
        batches.append(to_device(inputs, device))
        seen += len(targets)
        if seen >= samples:
            break
    return batches


def _write(
    args: argparse.Namespace, plan: Plan, outcomes: list[Outcome], parts: Parts, *, device: Any
) -> None:
    from ..report import ReportData, write_report
    from ..report.provenance import provenance
    from ..report.tradeoff import tradeoff_section
    from .measure import command_line, show

    sizes = len(parts.train), len(parts.validation), len(parts.test)
    rows = tuple(outcome.row for outcome in outcomes)
    packed = [outcome.row.name for outcome in outcomes if outcome.form != "dense"]
    notes = [
        f"One run per row with seed {args.seed} on {sizes[2]:,} test samples: one sample is "
        f"{100 / sizes[2]:.2f} pp. Validation samples, not these, decide every choice."
    ]
    if parts.test_held_out:
        notes.append(
            f"The data have no splits: the test samples are {TEST_FRACTION:.0%} of every class, held out with seed "
            f"{args.seed} before anything else was taken from the data."
        )
    if packed:
        notes.append(
            f"Bytes of {', '.join(packed)} are those of the form they are stored in (codebook and packed indices, or "
            "one bit per weight and the weights that are not zero); to run, they are expanded to dense weights."
        )
    for outcome in outcomes:
        starved = sum(share < STARVED for share in outcome.leaf_shares)
        if starved:
            notes.append(
                f"{outcome.row.name}: {starved} of {len(outcome.leaf_shares)} leaves get fewer than {STARVED:.0%} of "
                "the test samples, so what they store is hardly used. More epochs, a larger responsibility_weight or a "
                "router_temperature above 1 may help."
            )
    report = ReportData(
        title=plan.values["title"] or f"Techniques compared on {Path(str(plan.values['data'])).name}",
        summary=f"{len(plan.runs)} lists of techniques on one trained network; trees beside their static twins.",
        facts={
            "Model": str(plan.values["model"]),
            "Data": f"{sizes[0]:,} train, {sizes[1]:,} validation, {sizes[2]:,} test",
            "Fine-tuning": f"{plan.values['epochs']} epochs after each restructuring",
            "Device": str(device),
        },
        rows=rows,
        provenance=provenance(
            command_line(args),
            seed=args.seed,
            recipe=", ".join(f"{k} {v}" for k, v in plan.recipe.to_dict().items() if k != "algorithm"),
            seconds=f"{sum(outcome.seconds for outcome in outcomes):.0f} in all rows",
        ),
        notes=tuple(notes),
        sections=(tradeoff_section(rows),),
    )
    page, record = write_report(args.out / "report.html", report)
    show(args, report, report=page, data=record)
