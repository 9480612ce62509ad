"""What a training run did, epoch by epoch: returned, and written as CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .checkpoint import write_atomically


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Shares and balance are those of validation where there is one, of training otherwise.

    Attributes:
        epoch: from 1.
        lr: learning rate of the last iteration.
        train_loss: mean of the objective (eq. 8 for a tree) over the epoch.
        train_accuracy: of the hard-routed leaf, while training.
        val_loss: mean cross-entropy in hard routing.
        val_accuracy: share of correct samples in hard routing.
        val_mean_class_accuracy: mean of the classes' accuracies.
        leaf_shares: share of samples per leaf; empty for a plain module.
        balance: entropy of the shares / ln(leaves).
        seconds: wall time of the epoch, validation included.
        samples: training samples of the epoch, all ranks.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    val_mean_class_accuracy: float | None
    leaf_shares: tuple[float, ...]
    balance: float | None
    seconds: float
    samples: int

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EpochRecord:
        """Read one entry of the JSON log."""
        try:
            return cls(**{**data, "leaf_shares": tuple(data["leaf_shares"])})
        except (KeyError, TypeError) as error:
            raise FormatError(f"not an epoch record of this release: {error}") from error


@dataclass(frozen=True)
class History:
    """Result of a training run.

    Attributes:
        records: all epochs, those before a resume included.
        leaves: leaf paths, in the order of ``leaf_shares``.
        best_epoch: epoch (from 1) of the highest validation accuracy; None without validation.
        complete: False when ``max_seconds`` stopped the run early; call again to go on.
    """

    records: tuple[EpochRecord, ...]
    leaves: tuple[str, ...] = ()
    best_epoch: int | None = None
    complete: bool = True

    @property
    def last(self) -> EpochRecord:
        """The last epoch's record."""
        return self.records[-1]

    @property
    def best_accuracy(self) -> float | None:
        """Highest validation accuracy."""
        return None if self.best_epoch is None else self.records[self.best_epoch - 1].val_accuracy

    @property
    def seconds(self) -> float:
        """Wall time of all epochs."""
        return sum(record.seconds for record in self.records)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` with ``.json`` and ``.csv`` appended, each atomically; it may end in one of them already."""
        stem = Path(path)
        if stem.suffix in (".json", ".csv"):  # any other, as in "lr0.05", is part of the name
            stem = stem.with_suffix("")
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_atomically(stem.with_name(f"{stem.name}.json"), text.encode())
        write_atomically(stem.with_name(f"{stem.name}.csv"), self._csv().encode())

    def _csv(self) -> str:
        shares = [f"share_{leaf}" for leaf in self.leaves]
        names = [field.name for field in dataclasses.fields(EpochRecord) if field.name != "leaf_shares"]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, *shares])
        for record in self.records:
            writer.writerow([*(getattr(record, name) for name in names), *record.leaf_shares])
        return text.getvalue()


def best_epoch(records: Sequence[EpochRecord]) -> int | None:
    """Epoch of the highest validation accuracy, the earliest of equals; None without validation."""
    scored = [(record.val_accuracy, -record.epoch) for record in records if record.val_accuracy is not None]
    return -max(scored)[1] if scored else None
