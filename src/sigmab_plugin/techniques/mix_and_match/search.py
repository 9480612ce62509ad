"""All strategies with all scores on one model: ranked, resumable, several at a time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...counting import parameter_count
from ...errors import CalibrationError, ConfigError
from ...tuning.seeding import preserve_random_state, seed_epoch
from ..supervised import LossFunction
from .config import MixAndMatchConfig
from .masks import build_masks, load_masks, mask_sparsity, save_masks
from .ranges import LayerRange, observe_ranges
from .results import Run, SearchResult, choose, rank
from .roles import find_layers, matches, skipped_layers
from .scores import Sensitivity, measure_sensitivity
from .strategies import layer_sparsities
from .tuning import finetune_masked

logger = logging.getLogger(__name__)

#: ``prune(copy of the model, sparsities)`` -> structurally pruned module; used instead of masks.
Prune = Callable[[nn.Module, Mapping[str, float]], nn.Module]

_VERSION = 2
STRUCTURED = "structured"


@preserve_random_state()
def calibration_part(data: Iterable[Any], share: float, *, seed: int = 0) -> list[Any]:
    """The first ``share`` of the batches of ``data`` in its order of (``seed``, epoch 0), one at least.

    Raises:
        CalibrationError: ``data`` has no length; pass calibration data, or a list.
    """
    try:
        count = len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise CalibrationError(
            "train_data has no length to take a share of; pass calibration_data"
        ) from error
    seed_epoch(data, seed=seed, epoch=0)
    return list(itertools.islice(data, max(1, math.ceil(share * count))))


def analyse(
    model: nn.Module,
    config: MixAndMatchConfig,
    *,
    example_inputs: Any,
    calibration_data: Iterable[Any],
    loss_fn: LossFunction | None = None,
) -> tuple[tuple[LayerRange, ...], Sensitivity]:
    """Roles, sensitivities and ranges: what every strategy starts from. ``model`` is only read."""
    layers = find_layers(model, example_inputs, config)
    skipped = [name for name in skipped_layers(model) if not matches(name, config.ignored_layers)]
    if skipped:
        logger.warning(
            "mix_and_match: %s stay dense: only modules without children are pruned; remove_parametrizations makes a "
            "parametrized one such",
            ", ".join(name or "the model's own weights" for name in skipped),
        )
    sensitivity = measure_sensitivity(
        model, layers, calibration_data, loss_fn=loss_fn, hessian="grasp" in config.criteria
    )
    return observe_ranges(layers, sensitivity, config), sensitivity


@preserve_random_state()
def search(
    model: nn.Module,
    config: MixAndMatchConfig | None = None,
    *,
    example_inputs: Any,
    validate: Callable[[nn.Module], float],
    train_data: Iterable[Any] | None = None,
    calibration_data: Iterable[Any] | None = None,
    loss_fn: LossFunction | None = None,
    prune: Prune | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Try ``config.strategies`` x ``config.scores`` and choose on the validation split.

    Args:
        model: trained; left as it was.
        example_inputs: one batch, to find the layers' roles.
        validate: score of a module on a *validation* split, higher is better; never the test split, or the
            choice among 30 runs flatters the result. Called from several threads where ``config.workers`` is not 1.
        train_data: re-iterable of ``(inputs, targets)`` for masked fine-tuning.
        calibration_data: ``(inputs, targets)`` for ranges and scores; by default a share of ``train_data``.
        prune: structured pruning instead of masks, e.g. through ``structured_ratios``; then each strategy
            is one run.
        folder: the ranges, one JSON file per run and the chosen weights; a second call with the same arguments
            goes on where the first was stopped, with the ranges that it found there.

    Raises:
        CalibrationError: data missing for what the configuration asks.
        ConfigError: ``folder`` belongs to another search.
    """
    config = config or MixAndMatchConfig()
    if config.finetune_epochs and train_data is None:
        raise CalibrationError(
            "mix_and_match: finetune_epochs needs train_data; give it or set finetune_epochs to 0"
        )
    if calibration_data is None:
        if train_data is None:
            raise CalibrationError("mix_and_match: ranges need calibration_data of (inputs, targets)")
        calibration_data = calibration_part(train_data, config.calibration_share, seed=config.seed)
    store = _Store(folder, model, config, prune is not None)
    seed_epoch(calibration_data, seed=config.seed, epoch=0)
    observed, sensitivity = analyse(
        model, config, example_inputs=example_inputs, calibration_data=calibration_data, loss_fn=loss_fn
    )
    ranges = store.settle(observed)
    dense = float(validate(copy.deepcopy(model).eval()))
    trial = _Trial(model, config, sensitivity, validate, train_data, loss_fn, prune)
    best = _Best(config, dense, store)
    workers = config.workers or usable_cores()
    scores = (STRUCTURED,) if prune is not None else config.scores
    first_of: dict[tuple[Any, ...], str] = {}
    plans: list[tuple[str, str, dict[str, float]]] = []
    repeated: list[tuple[str, str, str]] = []
    for score, strategy in itertools.product(scores, config.strategies):
        sparsities = layer_sparsities(ranges, strategy)
        same = first_of.setdefault((score, *sparsities.values()), f"{score}-{strategy}")
        if same == f"{score}-{strategy}":
            plans.append((score, strategy, sparsities))
        else:
            repeated.append((score, strategy, same))

    # All of them before anything runs: a run is offered to the best of every finished one.
    finished = {plan[:2]: run for plan in plans if (run := store.read(*plan[:2])) is not None}
    for run in finished.values():
        best.known(run)

    def work(plan: tuple[str, str, dict[str, float]]) -> Run:
        if plan[:2] in finished:
            return finished[plan[:2]]
        run, net, masks = trial.run(*plan, seeded=workers == 1)
        logger.info(
            "mix_and_match: %s: sparsity %.3f, validation %.4f", run.key, run.sparsity, run.validation
        )
        best.offer(run, net, masks)
        store.write(run)
        return run

    if workers == 1:
        runs = [work(plan) for plan in plans]
    else:
        with ThreadPoolExecutor(workers) as pool:
            runs = list(pool.map(work, plans))
    failed = [run.key for run in runs if math.isnan(run.validation)]
    if failed:
        logger.warning(
            "mix_and_match: the validation score of %s is NaN; ranked last, never chosen before another",
            ", ".join(failed),
        )
    by_key = {run.key: run for run in runs}
    for score, strategy, same in repeated:
        first = by_key[same]
        runs.append(Run(score, strategy, first.sparsity, first.validation, 0.0, same_as=same))
    chosen = choose([run for run in runs if run.same_as is None], dense, config.max_drop)
    net, masks = best.restore(chosen, trial, layer_sparsities(ranges, chosen.strategy))
    result = SearchResult(dense, ranges, rank(runs), chosen, net, masks)
    store.finish(result)
    return result


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _Trial:
    model: nn.Module
    config: MixAndMatchConfig
    sensitivity: Sensitivity
    validate: Callable[[nn.Module], float]
    train_data: Iterable[Any] | None
    loss_fn: LossFunction | None
    prune: Prune | None

    def start(self, score: str, sparsities: Mapping[str, float]) -> tuple[nn.Module, dict[str, Tensor]]:
        """The pruned copy before fine-tuning, and its masks."""
        net = copy.deepcopy(self.model)
        if self.prune is not None:
            net = self.prune(net, sparsities)
            flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
            for name, parameter in net.named_parameters():  # narrower ones are new, and not frozen any more
                parameter.requires_grad_(flags.get(name, parameter.requires_grad))
            return net, {}
        return net, build_masks(self.sensitivity, sparsities, score)

    def run(
        self, score: str, strategy: str, sparsities: Mapping[str, float], *, seeded: bool
    ) -> tuple[Run, nn.Module, dict[str, Tensor]]:
        """One run. ``seeded``: so is what the pruning draws (one thread at a time only)."""
        started = time.perf_counter()
        data: Iterable[Any] = () if self.train_data is None else self.train_data
        if seeded:
            seed_epoch(data, seed=self.config.seed, epoch=0)
        elif callable(getattr(data, "set_epoch", None)):
            data = copy.copy(data)  # each thread is in an epoch of its own
        net, masks = self.start(score, sparsities)
        finetune_masked(net, masks, data, self.config, loss_fn=self.loss_fn)
        total = parameter_count(self.model)
        gone = 1 - parameter_count(net) / total if self.prune is not None else mask_sparsity(masks, total)
        value = float(self.validate(net))
        return Run(score, strategy, gone, value, time.perf_counter() - started), net.eval(), masks


class _Best:
    """Keeps the weights of the run that would be chosen among those finished so far."""

    def __init__(self, config: MixAndMatchConfig, dense: float, store: _Store) -> None:
        self._config, self._dense, self._store = config, dense, store
        self._runs: list[Run] = []
        self._kept: tuple[str, nn.Module, dict[str, Tensor]] | None = None
        self._lock = threading.Lock()

    def known(self, run: Run) -> None:
        with self._lock:
            self._runs.append(run)

    def offer(self, run: Run, net: nn.Module, masks: dict[str, Tensor]) -> None:
        with self._lock:
            self._runs.append(run)
            if choose(self._runs, self._dense, self._config.max_drop) is run:
                self._kept = (run.key, net, masks)
                self._store.write_best(run.key, net, masks)

    def restore(
        self, chosen: Run, trial: _Trial, sparsities: Mapping[str, float]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Weights of ``chosen``: in memory, in the folder, or by running it once more."""
        if self._kept is not None and self._kept[0] == chosen.key:
            return self._kept[1], self._kept[2]
        stored = self._store.read_best(chosen.key)
        if stored is None:
            logger.warning("mix_and_match: the weights of %s are gone; running it again", chosen.key)
            _, net, masks = trial.run(chosen.score, chosen.strategy, sparsities, seeded=True)
            self._store.write_best(chosen.key, net, masks)
            return net, masks
        net, _ = trial.start(chosen.score, sparsities)
        net.load_state_dict(stored[0])
        return net.eval(), stored[1]


class _Store:
    """The folder of a search: ``search.json``, ``runs/*.json``, ``best.*``. Without a folder it keeps nothing."""

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        model: nn.Module,
        config: MixAndMatchConfig,
        structured: bool,
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._ranges: list[dict[str, Any]] | None = None
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
        found = json.loads(path.read_text())
        self._ranges = found.pop("ranges", None)
        if found != self._header:
            raise ConfigError(
                f"{self._folder} holds a search with other options, of another model or of another version of the "
                "package; give an empty folder"
            )

    def settle(self, observed: Sequence[LayerRange]) -> tuple[LayerRange, ...]:
        """The ranges that the search began with: those of the folder, else ``observed``, which are put there."""
        if self._folder is None:
            return tuple(observed)
        if self._ranges is None:
            (self._folder / "runs").mkdir(parents=True, exist_ok=True)
            self._ranges = [dataclasses.asdict(layer) for layer in observed]
            _write_json(self._folder / "search.json", {**self._header, "ranges": self._ranges})
        ranges = tuple(LayerRange.from_dict(layer) for layer in self._ranges)
        if ranges != tuple(observed):
            logger.warning(
                "mix_and_match: the calibration data gives other ranges than when the search in %s began; going on "
                "with those of then",
                self._folder,
            )
        return ranges

    def read(self, score: str, strategy: str) -> Run | None:
        if self._folder is None:
            return None
        path = self._folder / "runs" / f"{score}-{strategy}.json"
        return Run(**json.loads(path.read_text())) if path.exists() else None

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
        if json.loads((self._folder / "best.json").read_text())["run"] != key:
            return None
        return load_file(self._folder / "best.safetensors"), load_masks(
            self._folder / "best-masks.safetensors"
        )

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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
