"""Measure networks on held-out data, print their table, write their report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..data import Dataset
    from ..report import ReportData, Row
    from ..tuning import Evaluation, History


@dataclass(frozen=True)
class Measured:
    """A network and what is known of it. ``role`` is ``dense``, ``sigmab``, ``twin`` or ``other``."""

    name: str
    role: str
    module: nn.Module
    evaluation: Evaluation | None = None
    history: History | None = None


def example_of(data: Dataset, device: Any) -> Any:
    """Inputs of one sample, as a batch of one.

    Raises:
        ConfigError: there is none.
    """
    from ..errors import ConfigError
    from ..tuning.batches import to_device

    if not len(data):
        raise ConfigError("the data have no samples; give other --data or another --split")
    return to_device(data.batch([0])[0], device)


def check_fit(module: nn.Module, example: Any, classes: int, data: str) -> None:
    """Run one sample, so that data of another shape is a clear error before any work.

    Raises:
        ModelError: the model does not take the data, or has another number of classes.
    """
    import torch

    from ..counting import as_arguments
    from ..errors import ModelError
    from ..tuning.evaluation import hard_routing

    shapes = ", ".join(str(tuple(part.shape)) for part in as_arguments(example))
    try:
        with hard_routing(module), torch.no_grad():
            logits = module(*as_arguments(example))
    except Exception as error:  # a forward pass may raise anything
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"the model does not take one sample of {data}, shape {shapes}: {reason}") from error
    if torch.is_tensor(logits) and logits.ndim == 2 and logits.shape[1] < classes:
        raise ModelError(
            f"the model has {logits.shape[1]} classes and {data} has {classes}; see --model-args, or choose other data"
        )


def accuracy_on(loader: Iterable[Any]) -> Callable[[nn.Module], float]:
    """What a technique chooses by: accuracy on held-out batches, a tree's with hard routing."""

    def accuracy(network: nn.Module) -> float:
        from ..tuning import evaluate

        return evaluate(network, loader).accuracy

    return accuracy


def table_row(network: Measured, example: Any) -> Row:
    """Accuracy and counts of one network."""
    from ..report.counts import module_row, net_row

    accuracy = None if network.evaluation is None else network.evaluation.accuracy
    if network.role == "sigmab":
        return net_row(network.name, network.module, example, accuracy=accuracy)  # type: ignore[arg-type]
    return module_row(network.name, network.module, example, role=network.role, accuracy=accuracy)


def collect(
    networks: Sequence[Measured],
    *,
    example: Any,
    classes: Sequence[str],
    title: str,
    summary: str = "",
    facts: dict[str, str],
    origin: dict[str, str],
    notes: Sequence[str] = (),
) -> ReportData:
    """All that a report shows of ``networks``; the first tree among them gives tree, leaves and channels."""
    from ..report import ReportData
    from ..report.counts import channel_panels, curve, leaf_counts, tree_figure

    data = ReportData(
        title=title,
        summary=summary,
        facts={**facts, "Date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")},
        rows=tuple(table_row(network, example) for network in networks),
        curves=tuple(
            curve(network.name, network.history, role=network.role) for network in networks if network.history
        ),
        provenance=origin,
        notes=tuple(notes),
    )
    tree: Any = next((network for network in networks if network.role == "sigmab"), None)
    if tree is None:
        return data
    return replace(
        data,
        tree=tree_figure(tree.module),
        channels=channel_panels(tree.module.plan),
        leaves=None if tree.evaluation is None else leaf_counts(tree.module, tree.evaluation, classes),
    )


def show(args: argparse.Namespace, data: ReportData, /, **files: Path | None) -> None:
    """Print the table (or JSON) of ``data`` and where files were written."""
    from ..report import counts_table, leaf_shares, rows_to_json

    written = {name: str(path) for name, path in files.items() if path is not None}
    shares = (
        None if data.leaves is None else dict(zip(data.leaves.leaves, leaf_shares(data.leaves), strict=True))
    )
    if args.json:
        record = {"networks": rows_to_json(data.rows), "leaf_shares": shares, "files": written}
        print(json.dumps(record, indent=1))
        return
    print(counts_table(data.rows).text())
    if shares is not None:
        from ..tuning import balance

        parts = "  ".join(f"{leaf} {share:.1%}" for leaf, share in shares.items())
        print(f"\nleaf shares  {parts}  balance {balance(tuple(shares.values())):.2f}")
    if written:
        print()
    width = max(map(len, written), default=0)
    for name, path in written.items():
        print(f"{name.ljust(width)}  {path}")


def read_history(path: Path | None) -> History | None:
    """A training log in JSON; None where there is none."""
    from ..errors import FormatError
    from ..tuning import EpochRecord, History
    from .options import read_json

    if path is None or not path.is_file():
        return None
    content = read_json(path)
    try:
        records = tuple(EpochRecord.from_dict(record) for record in content["records"])
        return History(records, tuple(content["leaves"]), content["best_epoch"], content["complete"])
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path} is no training log of this release: {error}") from error


def say(args: argparse.Namespace, text: str) -> None:
    """A step of the work, for people who wait: on stderr, so that stdout holds results alone."""
    from ..tuning.distributed import is_main

    if shows_progress(args) and is_main():
        print(text, file=sys.stderr, flush=True)


class SampleCounter:
    """A line on the terminal that counts the samples of a pass; silent where nobody watches."""

    def __init__(self, args: argparse.Namespace, samples: int) -> None:
        from ..tuning.distributed import is_main

        self.samples = samples
        self.shown = shows_progress(args) and is_main() and sys.stderr.isatty()

    def __call__(self, level: str, done: int) -> None:
        if self.shown:
            end = "\n" if done >= self.samples else ""
            print(f"\r{level}: {done:,} of {self.samples:,} samples", end=end, file=sys.stderr, flush=True)


def shows_progress(args: argparse.Namespace) -> bool:
    return not (args.quiet or args.json)


def command_line(args: argparse.Namespace) -> list[str]:
    """The command as it was typed, under the name it is installed by."""
    return ["sigmab", *args.argv]
