"""Try every cut, and say which are worth having: parameters, MACs, measured latency, score."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...counting import as_arguments, macs, parameter_count, storage_bytes
from ...errors import CalibrationError, ConfigError, FormatError
from .config import DepthPruningConfig
from .cuts import TracedModel, trace
from .network import DepthPrunedNet, depth_prune, load_depth_pruned, save_depth_pruned
from .training import Loss, train

logger = logging.getLogger(__name__)

FORMAT, VERSION = "sigmab_plugin.depth_pruning.sweep", 2

#: The row of the network as it was given.
DENSE = ""


@dataclass(frozen=True)
class SweepRow:
    """One network of a sweep.

    Attributes:
        cut: last block that is kept; ``""`` for the network as it was given.
        parameters: weights and biases.
        statistics: running means and variances, which Keras counts as parameters too.
        macs: multiply-accumulates of one sample: convolutions and matrix products.
        stored_bytes: parameters and buffers in memory.
        latency_ms: median of the timed runs of one sample on this machine.
        score: what ``validate`` said, higher is better.
        train_seconds: time spent on the auxiliary head.
    """

    cut: str
    parameters: int
    statistics: int
    macs: int
    stored_bytes: int
    latency_ms: float
    score: float
    train_seconds: float


@dataclass(frozen=True)
class SweepResult:
    """All networks of a sweep; the first row is the dense one."""

    rows: tuple[SweepRow, ...]

    @property
    def dense(self) -> SweepRow:
        return self.rows[0]

    def pareto(self) -> tuple[SweepRow, ...]:
        """Rows that no other row beats or equals in all of parameters, MACs, latency and score."""
        return pareto(self.rows)

    def smallest(self, *, max_drop: float) -> SweepRow:
        """The row with the fewest parameters whose score is at most ``max_drop`` below the dense one."""
        # The tolerance is for rounding: 0.99 - 0.01 is more than 0.98.
        good = [row for row in self.rows if row.score >= self.dense.score - max_drop - 1e-9]
        return min(good, key=lambda row: (row.parameters, row.macs))

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [asdict(row) for row in self.rows], "pareto": [row.cut for row in self.pareto()]}


def pareto(rows: Sequence[SweepRow]) -> tuple[SweepRow, ...]:
    """The rows that are not dominated; of equal rows the first stays, and none whose score is NaN."""

    def costs(row: SweepRow) -> tuple[float, ...]:
        return row.parameters, row.macs, row.latency_ms, -row.score

    def dominated(index: int) -> bool:
        mine = costs(rows[index])
        for other, row in enumerate(rows):
            theirs = costs(row)
            if all(t <= m for t, m in zip(theirs, mine, strict=True)) and (theirs != mine or other < index):
                return True
        return False

    return tuple(row for index, row in enumerate(rows) if not math.isnan(row.score) and not dominated(index))


def measure_latency(model: nn.Module, inputs: Any, *, repeats: int = 30, warmup: int = 5) -> float:
    """Median wall-clock time of ``model(*inputs)`` in milliseconds, in eval mode and without gradients."""
    arguments = as_arguments(inputs)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    runnable = copy.deepcopy(model).eval()
    times = []
    with torch.no_grad():
        for index in range(warmup + repeats):
            start = time.perf_counter()
            runnable(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if index >= warmup:
                times.append(time.perf_counter() - start)
    return 1000.0 * sorted(times)[len(times) // 2]


def statistics_count(model: nn.Module) -> int:
    """Values of running means and variances."""
    return sum(
        buffer.numel()
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    )


def normalisation_macs(model: nn.Module, inputs: Any) -> int:
    """Values that BatchNorm layers write in one run: one multiply-accumulate each, were it not folded.

    :func:`sigmab_plugin.counting.macs` leaves normalisation out; the figures published for depth
    pruning are met when this is added to it.
    """
    runnable = copy.deepcopy(model).eval()
    written = 0

    def count(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        nonlocal written
        written += output.numel()

    for module in runnable.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(count)
    with torch.no_grad():
        runnable(*as_arguments(inputs))
    return written


def sweep(
    model: nn.Module,
    example_inputs: Any,
    *,
    train_data: Iterable[Any],
    validate: Callable[[nn.Module], float],
    config: DepthPruningConfig | None = None,
    cuts: Sequence[str] | None = None,
    directory: str | Path | None = None,
    loss_fn: Loss | None = None,
) -> SweepResult:
    """Cut ``model`` at every place, train each auxiliary head, and measure.

    Args:
        model: left as it was.
        example_inputs: one batch for tracing; its first sample is counted and timed.
        train_data: re-iterable of ``(inputs, targets)``.
        validate: ``validate(net)`` -> score on a *validation* split, higher is better.
        cuts: names from :func:`enumerate_cuts`; all of ``config.granularity`` where not given.
        directory: results and weights of finished cuts are kept there; a second call goes on from them.
            The data is not part of what is compared: use a new directory for other data.
        loss_fn: ``loss_fn(logits, targets)``; cross-entropy where absent.

    Raises:
        CalibrationError: ``validate`` gives NaN for ``model``, so that no cut can be compared with it.
        ConfigError: a cut does not exist, or the granularity leaves none.
        FormatError: ``directory`` holds the sweep of another model or configuration.
    """
    config = config if config is not None else DepthPruningConfig()
    traced = trace(model, example_inputs)
    names = _cut_names(traced, cuts, config)
    sample = tuple(_first(argument) for argument in as_arguments(example_inputs))
    store = _Store(Path(directory), _fingerprint(model, config)) if directory is not None else None
    rows = []
    for name in (DENSE, *names):
        row = store.rows.get(name) if store is not None else None
        if row is None:
            net, seconds = copy.deepcopy(model).eval(), 0.0
            if name != DENSE:
                start = time.perf_counter()
                net = build(model, example_inputs, config.replace(cut=name), traced=traced)
                train(net, train_data, config, loss_fn=loss_fn)
                seconds = time.perf_counter() - start
            row = _measure(name, net, sample, validate, config, seconds)
            if name == DENSE and math.isnan(row.score):
                raise CalibrationError(
                    "depth_pruning: validate gave NaN for the network as it was given; check its data and its weights"
                )
            logger.info("depth pruning: %s", row)
            if store is not None:
                store.add(row, net)
        rows.append(row)
    return SweepResult(tuple(rows))


def build(
    model: nn.Module, example_inputs: Any, config: DepthPruningConfig, *, traced: TracedModel | None = None
) -> DepthPrunedNet:
    """The untrained depth-pruned network that ``config`` describes."""
    return depth_prune(
        model,
        example_inputs,
        cut=config.cut,
        head_widths=config.head_widths,
        num_classes=config.num_classes,
        freeze=config.freeze,
        seed=config.seed,
        traced=traced,
    )


def from_sweep(directory: str | Path, cut: str, model: nn.Module, example_inputs: Any) -> nn.Module:
    """The trained network of a finished cut; the dense model's copy for ``""``."""
    if cut == DENSE:
        return copy.deepcopy(model).eval()
    return load_depth_pruned(_weights_path(Path(directory), cut), model, example_inputs)


def _cut_names(traced: TracedModel, cuts: Sequence[str] | None, config: DepthPruningConfig) -> list[str]:
    if cuts is not None:
        return [traced.find(name).name for name in cuts]
    names = [cut.name for cut in traced.cuts if config.granularity == "layer" or cut.is_block]
    if not names:
        raise ConfigError("depth_pruning: no block ends at a single frontier; set granularity to 'layer'")
    return names


def _measure(
    name: str,
    net: nn.Module,
    sample: tuple[Any, ...],
    validate: Callable[[nn.Module], float],
    config: DepthPruningConfig,
    seconds: float,
) -> SweepRow:
    return SweepRow(
        cut=name,
        parameters=parameter_count(net),
        statistics=statistics_count(net),
        macs=macs(net, sample),
        stored_bytes=storage_bytes(net),
        latency_ms=measure_latency(net, sample, repeats=config.latency_repeats),
        score=float(validate(net)),
        train_seconds=seconds,
    )


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, torch.Tensor) and value.dim() > 0 else value


def _fingerprint(model: nn.Module, config: DepthPruningConfig) -> str:
    """Of the weights and of every option that changes a row."""
    digest = hashlib.sha256(
        json.dumps(config.replace(cut="", max_drop=0.0).to_dict(), sort_keys=True).encode()
    )
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _weights_path(directory: Path, cut: str) -> Path:
    return directory / f"{cut}.safetensors"


class _Store:
    """Finished rows on disk: ``sweep.json``, and one weights file per cut."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.fingerprint = directory, fingerprint
        self.rows: dict[str, SweepRow] = {}
        file = directory / "sweep.json"
        if not file.exists():
            return
        try:
            content = json.loads(file.read_text())
            version, found = content["version"], content["fingerprint"]
            rows = [SweepRow(**row) for row in content["rows"]] if version == VERSION else []
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f"{file} is not a sweep of depth pruning: {error}; remove it to start again"
            ) from error
        if version != VERSION:
            raise FormatError(
                f"{file} has version {version}, this package reads {VERSION}; use a new directory"
            )
        if found != fingerprint:
            raise FormatError(
                f"{file} is of another model or other options; use a new directory, or remove it to start again"
            )
        self.rows = {row.cut: row for row in rows}
        logger.info("depth pruning: going on from %d finished rows in %s", len(self.rows), directory)

    def add(self, row: SweepRow, net: nn.Module) -> None:
        if isinstance(net, DepthPrunedNet):
            save_depth_pruned(net, _weights_path(self.directory, row.cut))
        self.rows[row.cut] = row
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "rows": [asdict(done) for done in self.rows.values()],
        }
        partial = self.directory / "sweep.json.partial"
        partial.write_text(json.dumps(content, indent=1))
        os.replace(partial, self.directory / "sweep.json")
