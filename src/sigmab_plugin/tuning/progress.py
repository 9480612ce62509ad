"""Progress on standard error: rich where installed, else tqdm, else one log line per epoch."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .history import EpochRecord

logger = logging.getLogger(__name__)


def describe(record: EpochRecord, epochs: int) -> str:
    """One epoch in one line."""
    parts = [
        f"epoch {record.epoch}/{epochs}",
        f"loss {record.train_loss:.4f}",
        f"train {record.train_accuracy:.2%}",
    ]
    if record.val_accuracy is not None:
        parts.append(f"val {record.val_accuracy:.2%}")
    if record.leaf_shares:
        parts.append("leaves " + "/".join(f"{100 * share:.1f}" for share in record.leaf_shares))
    if record.balance is not None:
        parts.append(f"balance {record.balance:.2f}")
    return "  ".join((*parts, f"lr {record.lr:.2g}", f"{record.seconds:.1f} s"))


class Progress:
    """A bar over the steps of each epoch and a line after it; ``enabled=False`` shows nothing."""

    def __init__(self, *, enabled: bool, epochs: int) -> None:
        self._kind = _kind() if enabled else "none"
        self._epochs = epochs
        self._stack = ExitStack()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._kind == "rich":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            shown = RichProgress(
                *columns,
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file or a pipe stays there
            )
            self._bar = self._stack.enter_context(shown)
        return self

    def __exit__(self, *_: object) -> None:
        if self._kind == "tqdm" and self._bar is not None:
            self._bar.close()
        self._stack.close()

    @property
    def shows_steps(self) -> bool:
        """Whether the text of single steps is seen, and worth its computation."""
        return self._kind in ("rich", "tqdm")

    def start_epoch(self, epoch: int, steps: int) -> None:
        """Show an empty bar for ``epoch`` (from 1)."""
        title = f"epoch {epoch}/{self._epochs}"
        if self._kind == "rich":
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(title, total=steps, text="")
        elif self._kind == "tqdm":
            self._bar = import_module("tqdm.auto").tqdm(total=steps, desc=title, leave=False)

    def step(self, text: str | None = None) -> None:
        """One step is done; ``text`` replaces the figures beside the bar."""
        if self._kind == "rich":
            self._bar.update(self._task, advance=1, **({} if text is None else {"text": text}))
        elif self._kind == "tqdm":
            self._bar.update(1)
            if text is not None:
                self._bar.set_postfix_str(text)

    def finish_epoch(self, record: EpochRecord) -> None:
        """The epoch's line."""
        line = describe(record, self._epochs)
        if self._kind == "rich":
            self._bar.console.print(line, highlight=False, soft_wrap=True)
        elif self._kind == "tqdm":
            self._bar.close()
            self._bar.write(line, file=sys.stderr)
        elif self._kind == "log":
            logger.info(line)


def _kind() -> str:
    if find_spec("rich") is not None:
        return "rich"
    return "tqdm" if find_spec("tqdm") is not None else "log"
