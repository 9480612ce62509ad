"""All strategies with all scores on one model: ranked, resumable, several at a time."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...counting import parameter_count
from ...errors import CalibrationError, TrainingError
from ...tuning.seeding import loader_left_as_found, preserve_random_state, seed_epoch
from ..supervised import LossFunction
from .config import MixAndMatchConfig
from .folder import SearchFolder
from .masks import build_masks, mask_sparsity
from .ranges import LayerRange, observe_ranges
from .results import Run, SearchResult, choose, rank
from .roles import find_layers, matches, skipped_layers
from .scores import Sensitivity, measure_sensitivity
from .strategies import layer_sparsities
from .tuning import DivergenceError, finetune_masked

logger = logging.getLogger(__name__)

#: ``prune(copy of the model, sparsities)`` -> structurally pruned module; used instead of masks.
Prune = Callable[[nn.Module, Mapping[str, float]], nn.Module]

STRUCTURED = "structured"
_ALL_FAILED = "mix_and_match: the fine-tuning of every run diverged; try a lower finetune_lr"


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
        FormatError: a file in ``folder`` is damaged.
        TrainingError: fine-tuning of every run diverged; or it cannot start.
    """
    config = config or MixAndMatchConfig()
    if config.finetune_epochs and train_data is None:
        raise CalibrationError(
            "mix_and_match: finetune_epochs needs train_data; give it or set finetune_epochs to 0"
        )
    with loader_left_as_found(train_data), loader_left_as_found(calibration_data):
        if calibration_data is None:
            if train_data is None:
                raise CalibrationError("mix_and_match: ranges need calibration_data of (inputs, targets)")
            calibration_data = calibration_part(train_data, config.calibration_share, seed=config.seed)
        store = SearchFolder(folder, model, config, structured=prune is not None)
        seed_epoch(calibration_data, seed=config.seed, epoch=0)
        observed, sensitivity = analyse(
            model, config, example_inputs=example_inputs, calibration_data=calibration_data, loss_fn=loss_fn
        )
        ranges = store.settle(observed)
        dense = float(validate(copy.deepcopy(model).eval()))
        trial = _Trial(model, config, sensitivity, validate, train_data, loss_fn, prune)
        return _run_all(trial, ranges, dense, store)


def _run_all(
    trial: _Trial, ranges: tuple[LayerRange, ...], dense: float, store: SearchFolder
) -> SearchResult:
    """Every strategy with every score; equal sparsities once, finished runs not again."""
    config = trial.config
    best = _Best(config, dense, store)
    workers = config.workers or usable_cores()
    scores = (STRUCTURED,) if trial.prune is not None else config.scores
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
        if net is None:
            best.fail(run)
        else:
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
    without_score = [run.key for run in runs if math.isnan(run.validation) and run.key not in best.failed]
    if without_score:
        logger.warning(
            "mix_and_match: the validation score of %s is NaN; ranked last, never chosen before another",
            ", ".join(without_score),
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
    ) -> tuple[Run, nn.Module | None, dict[str, Tensor]]:
        """One run, without a network where it diverged. ``seeded``: so is what the pruning draws (one thread only)."""
        started = time.perf_counter()
        data: Iterable[Any] = () if self.train_data is None else self.train_data
        if seeded:
            seed_epoch(data, seed=self.config.seed, epoch=0)
        elif callable(getattr(data, "set_epoch", None)):
            data = copy.copy(data)  # each thread is in an epoch of its own
        net, masks = self.start(score, sparsities)
        total = parameter_count(self.model)
        gone = 1 - parameter_count(net) / total if self.prune is not None else mask_sparsity(masks, total)
        try:
            finetune_masked(net, masks, data, self.config, loss_fn=self.loss_fn)
        except DivergenceError as error:
            run = Run(score, strategy, gone, math.nan, time.perf_counter() - started)
            logger.warning("mix_and_match: %s failed and is never chosen: %s", run.key, error)
            return run, None, masks
        value = float(self.validate(net))
        return Run(score, strategy, gone, value, time.perf_counter() - started), net.eval(), masks


class _Best:
    """Keeps the weights of the run that would be chosen among those finished so far."""

    def __init__(self, config: MixAndMatchConfig, dense: float, store: SearchFolder) -> None:
        self._config, self._dense, self._store = config, dense, store
        self._runs: list[Run] = []
        self._kept: tuple[str, nn.Module, dict[str, Tensor]] | None = None
        self._lock = threading.Lock()
        self.failed: set[str] = set()

    def known(self, run: Run) -> None:
        with self._lock:
            self._runs.append(run)

    def fail(self, run: Run) -> None:
        """A run that diverged: it has no network to keep."""
        self.known(run)
        self.failed.add(run.key)

    def offer(self, run: Run, net: nn.Module, masks: dict[str, Tensor]) -> None:
        with self._lock:
            self._runs.append(run)
            if choose(self._runs, self._dense, self._config.max_drop) is run:
                self._kept = (run.key, net, masks)
                self._store.write_best(run.key, net, masks)

    def restore(
        self, chosen: Run, trial: _Trial, sparsities: Mapping[str, float]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Weights of ``chosen``: in memory, in the folder, or by running it once more.

        Raises:
            TrainingError: it diverged, as everything else did.
        """
        if chosen.key in self.failed:
            raise TrainingError(_ALL_FAILED)
        if self._kept is not None and self._kept[0] == chosen.key:
            return self._kept[1], self._kept[2]
        stored = self._store.read_best(chosen.key)
        if stored is None:
            logger.warning("mix_and_match: the weights of %s are gone; running it again", chosen.key)
            _, again, masks = trial.run(chosen.score, chosen.strategy, sparsities, seeded=True)
            if again is None:
                raise TrainingError(_ALL_FAILED)
            self._store.write_best(chosen.key, again, masks)
            return again, masks
        net, _ = trial.start(chosen.score, sparsities)
        net.load_state_dict(stored[0])
        return net.eval(), stored[1]
