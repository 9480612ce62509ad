"""The folder of a search: what it began with, one file per run, and the weights of the best run."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import ConfigError, FormatError
from .config import MixAndMatchConfig
from .masks import load_masks, save_masks
from .ranges import LayerRange
from .results import Run, SearchResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

_VERSION = 2


class SearchFolder:
    """``search.json``, ``runs/*.json``, ``best.*``; without a folder it keeps nothing.

    Raises:
        ConfigError: the folder belongs to another search.
        FormatError: one of its files is damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        model: nn.Module,
        config: MixAndMatchConfig,
        *,
        structured: bool,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._ranges: tuple[LayerRange, ...] | None = None
        if self._folder is None:
            return
        settings = {
            key: value for key, value in config.to_dict().items() if key not in ("workers", "max_drop")
        }
        self._header = {
            "version": _VERSION,
            "config": settings,
            "model": _fingerprint(model),
            "structured": structured,
        }
        path = self._folder / "search.json"
        if not path.exists():
            return
        found = _read_json(path, dict, "give an empty folder")
        ranges = found.pop("ranges", None)
        if found != self._header:
            raise ConfigError(
                f"{self._folder} holds a search with other options, of another model or of another version of the "
                "package; give an empty folder"
            )
        if ranges is not None:
            with _damage_reported(path, "give an empty folder"):
                self._ranges = tuple(LayerRange.from_dict(layer) for layer in ranges)

    def settle(self, observed: Sequence[LayerRange]) -> tuple[LayerRange, ...]:
        """The ranges that the search began with: those of the folder, else ``observed``, which are put there."""
        if self._folder is None:
            return tuple(observed)
        if self._ranges is None:
            (self._folder / "runs").mkdir(parents=True, exist_ok=True)
            self._ranges = tuple(observed)
            layers = [dataclasses.asdict(layer) for layer in observed]
            _write_json(self._folder / "search.json", {**self._header, "ranges": layers})
        if self._ranges != tuple(observed):
            logger.warning(
                "mix_and_match: the calibration data gives other ranges than when the search in %s began; going on "
                "with those of then",
                self._folder,
            )
        return self._ranges

    def read(self, score: str, strategy: str) -> Run | None:
        if self._folder is None:
            return None
        path = self._folder / "runs" / f"{score}-{strategy}.json"
        if not path.exists():
            return None
        return _read_json(path, lambda values: Run(**values), "delete it, and the run is done again")

    def write(self, run: Run) -> None:
        if self._folder is not None:
            _write_json(self._folder / "runs" / f"{run.key}.json", run.to_dict())

    def write_best(self, key: str, net: nn.Module, masks: Mapping[str, Tensor]) -> None:
        if self._folder is None:
            return
        (self._folder / "best.json").unlink(missing_ok=True)
        state = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in net.state_dict().items()
        }
        save_file(state, self._folder / "best.safetensors")
        save_masks(masks, self._folder / "best-masks.safetensors")
        _write_json(self._folder / "best.json", {"run": key})

    def read_best(self, key: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        if self._folder is None or not (self._folder / "best.json").exists():
            return None
        again = f"delete {self._folder / 'best.json'}, and the run is done again"
        if _read_json(self._folder / "best.json", lambda values: values["run"], again) != key:
            return None
        path = self._folder / "best.safetensors"
        with _damage_reported(path, again):
            state = load_file(path)
        return state, load_masks(self._folder / "best-masks.safetensors")

    def finish(self, result: SearchResult) -> None:
        if self._folder is not None:
            _write_json(self._folder / "result.json", result.to_dict())


def _fingerprint(model: nn.Module) -> int:
    """CRC-32 over names and values of the state dict."""
    value = 0
    for name, tensor in model.state_dict().items():
        value = zlib.crc32(name.encode(), value)
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            value = zlib.crc32(data.numpy().tobytes(), value)
    return value


def _read_json(path: Path, parse: Callable[[Any], T], remedy: str) -> T:
    with _damage_reported(path, remedy):
        return parse(json.loads(path.read_text()))


@contextmanager
def _damage_reported(path: Path, remedy: str) -> Iterator[None]:
    """What is wrong with a file's content, as a :class:`FormatError` that names it."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise FormatError(f"{path} is damaged ({error}); {remedy}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
