"""``sigmab compare``: techniques and their combinations on one model and one data set, in one table and plot."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import VALIDATION_FRACTION, add_run_options, build_model, pick_device, read_json

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

    def path(self, key: str) -> str | None:
        """A path of the file, relative to the file; names such as ``digits`` stay."""
        value = self.values[key]
        if value is None:
            return None
        beside = self.folder / value
        return str(beside) if beside.exists() else str(value)


def read_plan(file: Path) -> Plan:
    """Read and check the file of ``--config``.

    Raises:
        ConfigError: a missing or unknown key, or a run without name or sections.
    """
    from ..tuning import TrainRecipe
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
    if not isinstance(content["runs"], list) or not content["runs"]:
        raise ConfigError(f"{file}: 'runs' must be a list of objects with 'name' and 'compression'")
    runs = []
    for position, run in enumerate(content["runs"]):
        if not isinstance(run, Mapping) or set(run) != {"name", "compression"}:
            raise ConfigError(
                f"{file}: runs[{position}] must be an object with 'name' and 'compression' alone"
            )
        sections = run["compression"]
        sections = [sections] if isinstance(sections, Mapping) else sections
        runs.append(Run(str(run["name"]), tuple(dict(section) for section in sections)))
    values = {**DEFAULTS, **content}
    recipe = TrainRecipe.from_dict(values["finetune"])
    return Plan(values, tuple(runs), recipe, file.resolve().parent)


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
    train, validation, test = _splits(plan, seed=args.seed)

    def loader(dataset: Dataset, *, shuffle: bool = False) -> Loader:
        return data.Loader(dataset, batch_size=values["batch_size"], shuffle=shuffle, seed=args.seed)

    comparison = Comparison(
        model=model,
        example=example_of(train, device),
        train=loader(train, shuffle=True),
        validation=loader(validation),
        test=loader(test),
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
    _write(args, plan, outcomes, sizes=(len(train), len(validation), len(test)), device=device)


def _splits(plan: Plan, *, seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Train, validation and test; validation is held out of train unless the file names a split."""
    from .. import data

    source, size = str(plan.path("data")), plan.values["image_size"]

    def split(name: str) -> Dataset:
        return (
            data.digits(name)
            if source == "digits"
            else data.open_dataset(source, split=name, image_size=size)
        )

    train, test = split(plan.values["train_split"]), split(plan.values["test_split"])
    if plan.values["validation_split"]:
        return train, split(plan.values["validation_split"]), test
    train, validation = data.split_validation(train, fraction=plan.values["validation_fraction"], seed=seed)
    return train, validation, test


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
    args: argparse.Namespace, plan: Plan, outcomes: list[Outcome], *, sizes: tuple[int, int, int], device: Any
) -> None:
    from ..report import ReportData, write_report
    from ..report.provenance import provenance
    from ..report.tradeoff import tradeoff_section
    from .measure import command_line, show

    rows = tuple(outcome.row for outcome in outcomes)
    packed = [outcome.row.name for outcome in outcomes if outcome.form != "dense"]
    notes = [
        f"One run per row with seed {args.seed} on {sizes[2]:,} test samples: one sample is "
        f"{100 / sizes[2]:.2f} pp. Validation samples, not these, decide every choice."
    ]
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
