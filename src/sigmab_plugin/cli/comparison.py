"""Techniques and their combinations on one model and one data set, one row each, resumable.

Runs that begin with the same sections share the networks of that beginning. Every tree has its static twin as a
row of its own, trained with the same recipe.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FormatError

if TYPE_CHECKING:
    from torch import nn

    from ..report import Row
    from ..techniques.base import Technique
    from ..tuning import TrainRecipe

logger = logging.getLogger(__name__)

VERSION = 2
#: Techniques that restructure and leave training to the caller.
FINETUNE_AFTER = ("sigmab", "torch_pruning")


@dataclass(frozen=True)
class Run:
    """One row: a name and the sections that lead to the network; no section is the dense network."""

    name: str
    sections: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        row: accuracy on the test split, counts, and bytes in the form in which they are stored.
        validation_accuracy: on the split that choices are made on.
        form: ``dense``, ``sparse`` or ``codebook``: how the bytes are stored.
        seconds: of this row alone, shared beginnings not counted again.
        leaf_shares: share of test samples by leaf; empty for what is no tree.
    """

    row: Row
    validation_accuracy: float
    form: str
    sections: tuple[dict[str, Any], ...]
    seconds: float
    leaf_shares: tuple[float, ...] = ()


@dataclass
class Comparison:
    """Everything that the runs share.

    Attributes:
        model: the dense network; left as it was.
        example: inputs of one sample, as a batch of one.
        train, validation, test: loaders of (inputs, targets).
        calibration: batches of inputs, for statistics.
        recipe, epochs: fine-tuning after each technique that restructures; 0 epochs: none.
        teacher: fine-tune with the dense network's logits where the recipe gives them weight.
        twins: add the static twin of every tree.
        directory: finished rows and checkpoints, under names that stand for all that decides them: other weights,
            data, settings or sections are other names, and nothing is deleted.
        settings: JSON types; what else decides the rows and is not seen in the other attributes.
        say: told what is being done.
    """

    model: nn.Module
    example: Any
    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any]
    calibration: Sequence[Any]
    techniques: Mapping[str, Technique]
    recipe: TrainRecipe
    epochs: int
    directory: Path
    finetune_after: tuple[str, ...] = FINETUNE_AFTER
    teacher: bool = True
    twins: bool = True
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    _networks: dict[str, nn.Module] = field(default_factory=dict)

    def run(self, runs: Sequence[Run]) -> list[Outcome]:
        """All rows: the dense network, the runs in order, each tree's twin after the first run that has it.

        Raises:
            ConfigError: two runs of one name, one of the dense network's name, or a list of sections that makes
                no sense; before anything runs.
        """
        from ..techniques.compose import parse_sections

        names = [run.name for run in runs]
        if len(set(names)) != len(names):
            raise ConfigError(f"two runs have the same name: {', '.join(sorted(names))}")
        if "dense" in names:
            raise ConfigError(
                "the row 'dense' is the network as given, which is always there: name the run otherwise"
            )
        for run in runs:
            try:
                parse_sections(run.sections, self.techniques)
            except ConfigError as error:
                raise ConfigError(f"run {run.name!r}: {error}") from error
        outcomes = [self._outcome(Run("dense"), "dense")]
        twins_done: set[str] = set()
        for run in runs:
            outcomes.append(self._outcome(run, "other"))
            tree = _tree_prefix(run.sections)
            if self.twins and tree and self._key(tree) not in twins_done:
                twins_done.add(self._key(tree))
                name = _twin_name(run, tree)
                name += (
                    f" ({run.name})" if name in {*names, *(outcome.row.name for outcome in outcomes)} else ""
                )
                outcomes.append(self._outcome(Run(name, tree), "twin"))
        return outcomes

    # One row ----------------------------------------------------------------------------------------

    def _outcome(self, run: Run, role: str) -> Outcome:
        file = self.directory / "rows" / f"{self._key(run.sections, role)}.json"
        found = _read_outcome(file, run)
        if found is not None:
            self.say(f"{run.name}: finished before")
            return found
        self.say(f"{run.name}: {' -> '.join(s['algorithm'] for s in run.sections) or 'as given'}")
        start = time.perf_counter()
        network = self._twin(run.sections) if role == "twin" else self.network(run.sections)
        outcome = self._measure(run, role, network, time.perf_counter() - start)
        _write_outcome(file, outcome)
        return outcome

    def _measure(self, run: Run, role: str, network: nn.Module, seconds: float) -> Outcome:
        from ..report.counts import module_row, net_row
        from ..techniques.footprint import footprint
        from ..tree import SigmaBNet
        from ..tuning import evaluate

        tested = evaluate(network, self.test)
        accuracy = tested.accuracy
        if isinstance(network, SigmaBNet):
            row = net_row(run.name, network, self.example, accuracy=accuracy)
        else:
            row = module_row(run.name, network, self.example, role=role, accuracy=accuracy)
        size = footprint(network)
        return Outcome(
            row=replace(row, active_bytes=size.active, stored_bytes=size.stored),
            validation_accuracy=evaluate(network, self.validation).accuracy,
            form=size.form,
            sections=run.sections,
            seconds=seconds,
            leaf_shares=tested.leaf_shares,
        )

    # Networks -----------------------------------------------------------------------------------------

    def network(self, sections: Sequence[dict[str, Any]]) -> nn.Module:
        """The network after ``sections``, from the nearest beginning that is known."""
        if not sections:
            return self.model
        key = self._key(sections)
        if key not in self._networks:
            before = self.network(sections[:-1])
            technique = self.techniques[sections[-1]["algorithm"]]
            config = technique.config.from_dict(sections[-1])
            with self._from_the_start():
                network = technique.apply(before, config, self._context(key))
            if technique.name in self.finetune_after:
                self._finetune(network, key)
            self._networks[key] = network
        return self._networks[key]

    def _twin(self, sections: Sequence[dict[str, Any]]) -> nn.Module:
        from ..config import SigmaBConfig
        from ..tree import static_twin

        config = SigmaBConfig.from_dict(sections[-1])
        before = self.network(sections[:-1])
        with self._from_the_start():
            twin = static_twin(before, self.example, config=config, calibration_data=self.calibration)
        self._finetune(twin, "twin-" + self._key(sections))
        return twin

    @contextmanager
    def _from_the_start(self) -> Iterator[None]:
        """Random numbers and data order as if nothing had run before: rows may have been finished earlier."""
        from ..tuning.seeding import preserve_random_state, seed_epoch

        with preserve_random_state():
            seed_epoch(self.train, seed=self.seed, epoch=0)
            yield

    def _finetune(self, network: nn.Module, key: str) -> None:
        from ..tuning import finetune

        if not self.epochs:
            return
        teacher = copy.deepcopy(self.model) if self.teacher and self.recipe.distillation_weight else None
        finetune(
            network,
            self.train,
            epochs=self.epochs,
            recipe=self.recipe,
            val_loader=self.validation,
            teacher=teacher,
            checkpoint_dir=self.directory / "checkpoints" / key,
            progress=False,
            seed=self.seed,
        )

    def _context(self, key: str) -> Any:
        from ..techniques.base import Context
        from .measure import accuracy_on

        return Context(
            example_inputs=self.example,
            calibration_data=self.calibration,
            train_data=self.train,
            validate=accuracy_on(self.validation),
            seed=self.seed,
            options={"folder": self.directory / "checkpoints" / key},
        )

    # Names of files ----------------------------------------------------------------------------------

    def _key(self, sections: Sequence[Mapping[str, Any]], *role: str) -> str:
        """Of a network, or with its role of a row: all that runs share, and the sections."""
        text = json.dumps([self._base, list(sections), *role], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @cached_property
    def _base(self) -> str:
        """Of all that runs share: weights, data, recipe, seed, settings."""
        parts = {
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "epochs": self.epochs,
            "teacher": self.teacher,
            "finetune_after": self.finetune_after,
            "seed": self.seed,
            "settings": self.settings,
            "weights": digest([list(self.model.state_dict().items())]),
            "data": self._data(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _data(self) -> dict[str, str]:
        """Digests of every batch as the networks get it: content, batch size, number of samples and order."""
        with self._from_the_start():
            splits = {"train": self.train, "validation": self.validation, "test": self.test}
            return {
                **{name: digest(batches) for name, batches in splits.items()},
                "calibration": digest(self.calibration),
            }


def digest(values: Iterable[Any]) -> str:
    """SHA-256 over names, shapes, types and contents: tensors, numbers and strings in tuples, lists, batches."""
    total = hashlib.sha256()
    for value in values:
        _digest_into(total, value)
    return total.hexdigest()


def _digest_into(total: Any, value: Any) -> None:
    import torch

    if hasattr(value, "to_dict"):  # a torch-geometric batch
        value = list(value.to_dict().items())
    if isinstance(value, (tuple, list)):
        total.update(f"[{len(value)}]".encode())
        for item in value:
            _digest_into(total, item)
    elif isinstance(value, str):
        total.update(value.encode())
    else:
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        total.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())


def _tree_prefix(sections: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The sections up to the one that makes the tree; empty where none does."""
    for index, section in enumerate(sections):
        if section["algorithm"] == "sigmab":
            return tuple(sections[: index + 1])
    return ()


def _twin_name(run: Run, tree: Sequence[dict[str, Any]]) -> str:
    if len(tree) == len(run.sections):
        return f"static twin of {run.name}"
    return f"static twin of {' -> '.join(section['algorithm'] for section in tree)}"


def _read_outcome(file: Path, run: Run) -> Outcome | None:
    from ..report import Row

    if not file.exists():
        return None
    try:
        content = json.loads(file.read_text())
        row = replace(Row(**content["row"]), name=run.name)
        return Outcome(
            row=row,
            validation_accuracy=content["validation_accuracy"],
            form=content["form"],
            sections=run.sections,
            seconds=content["seconds"],
            leaf_shares=tuple(content["leaf_shares"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is no finished row: {error}; remove it to run it again") from error


def _write_outcome(file: Path, outcome: Outcome) -> None:
    from ..tuning.checkpoint import write_atomically

    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(asdict(outcome), indent=1) + "\n").encode())
