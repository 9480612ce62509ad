"""One NNCF config file, any NNCF: the path is chosen by what is installed.

* NNCF 2.x: ``NNCFConfig`` and ``create_compressed_model`` (needs legacy tracing from 2.17 on);
* NNCF 3.x: :func:`sigmab_plugin.hosts.nncf_v3.compress`;
* no NNCF: files with techniques of ours only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, ConfigError, MissingDependencyError, ModelError
from ..techniques.base import Context
from .nncf_schema import Section, check, nncf_version, read
from .nncf_v3 import SectionReport, as_inputs

_log = logging.getLogger(__name__)

LEGACY_TRACING = "NNCF_TORCH_LEGACY_TRACING"


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress_from_file` made.

    Attributes:
        network: the compressed network, in eval mode.
        path: which way was taken, for people: ``"NNCF 3.4: functions"``.
        reports: what each section did.
        controller: NNCF 2.x's compression controller; None on the other paths.
    """

    network: nn.Module
    path: str
    reports: tuple[SectionReport, ...]
    controller: Any = None

    def save(self, directory: str | Path) -> Path:
        """Weights by safetensors, and beside them the JSON that rebuilds the structure.

        ``nncf.json`` (functions) is read by ``nncf_v3.load_from_config``; ``compression_state.json`` (2.x) is what
        ``create_compressed_model(compression_state=...)`` takes. A tree has its ``plan.json`` too, except on 2.x, where
        the plan is part of the compression state.
        """
        from safetensors.torch import save_file

        from ..tree.io import unshared

        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        weights = unshared(self.network.state_dict())
        if self.controller is not None:
            state = json.dumps(self.controller.get_compression_state(), indent=1, default=_plain)
            (target / "compression_state.json").write_text(state + "\n", encoding="utf-8")
            save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
            return target
        from ..tree.io import save as save_net
        from ..tree.net import SigmaBNet

        if isinstance(self.network, SigmaBNet):
            save_net(self.network, target)
        else:
            save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        if self.path != NO_NNCF:
            from .nncf_v3 import get_config

            try:
                text = json.dumps(get_config(self.network), indent=1)
            except ModelError as error:
                _log.warning("no nncf.json in %s: %s", target, error)
                return target
            (target / "nncf.json").write_text(text + "\n", encoding="utf-8")
        return target


NO_NNCF = "no NNCF installed: techniques of this package only"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a compression state cannot be written as JSON")


def compress_from_file(
    config: Mapping[str, Any] | str | Path,
    model: nn.Module,
    *,
    calibration_data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    train_data: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    fine_tune: Callable[[nn.Module, Any], None] | None = None,
    on_section: Callable[[SectionReport], None] | None = None,
    seed: int = 0,
) -> Compressed:
    """Carry out an NNCF config file with the NNCF that is installed.

    Args:
        calibration_data: re-iterable of ``(inputs, targets)``; inputs are a tensor or a tuple of positional arguments.
        fine_tune: ``fine_tune(network, what)``; ``what`` is the compression controller on NNCF 2.x (called once, at the
            end) and the algorithm's name elsewhere (called after each section).
        on_section: receives a report after each section, as it finishes.

    Raises:
        ConfigError: the file cannot be carried out here; nothing has run yet.
        MissingDependencyError: the file needs NNCF and there is none.
    """
    loaded = read(config)
    entries = check(loaded)
    reports: list[SectionReport] = []

    def report(entry: SectionReport) -> None:
        reports.append(entry)
        if on_section is not None:
            on_section(entry)

    context = Context(
        example_inputs=example_inputs,
        calibration_data=_inputs_of(calibration_data),
        train_data=train_data,
        loss_fn=loss_fn,
        validate=validate,
        seed=seed,
    )
    try:
        installed = nncf_version()
    except MissingDependencyError:
        others = [entry.algorithm for entry in entries if entry.technique is None]
        if others:
            raise MissingDependencyError(
                f"{', '.join(others)} needs NNCF, which is not installed: pip install 'sigmab-plugin[nncf]'"
            ) from None
        return Compressed(
            _techniques_only(model, entries, context, fine_tune, report), NO_NNCF, tuple(reports)
        )
    if installed[0] < 3:
        return _by_create_compressed_model(
            model, loaded, calibration_data, loss_fn, fine_tune, report, installed, reports
        )
    import nncf

    from .nncf_v3 import compress

    data = None
    if calibration_data is not None:
        data = nncf.Dataset(calibration_data, _inputs)
    network = compress(
        model,
        loaded,
        data,
        example_inputs=example_inputs,
        train_data=train_data,
        loss_fn=loss_fn,
        validate=validate,
        fine_tune=fine_tune,
        on_section=report,
        seed=seed,
    )
    return Compressed(network, f"NNCF {installed[0]}.{installed[1]}: functions", tuple(reports))


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


class _Inputs:
    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return map(_inputs, self._data)


def _inputs_of(data: Iterable[Any] | None) -> _Inputs | None:
    return None if data is None else _Inputs(data)


def _techniques_only(
    model: nn.Module,
    entries: tuple[Section, ...],
    context: Context,
    fine_tune: Callable[[nn.Module, Any], None] | None,
    report: Callable[[SectionReport], None],
) -> nn.Module:
    from dataclasses import replace

    if context.example_inputs is None:
        first = next(iter(context.calibration_data or ()), None)
        if first is None:
            raise CalibrationError(
                "neither example_inputs nor calibration_data: give one batch of inputs at least"
            )
        context = replace(context, example_inputs=as_inputs(first))
    network = model
    for entry in entries:
        assert entry.technique is not None
        before = sum(p.numel() for p in network.parameters())
        network = entry.technique.apply(network, entry.config, context)
        after = sum(p.numel() for p in network.parameters())
        facts = {"before": before, "after": after}
        report(SectionReport(str(entry), f"{before:,} parameters before, {after:,} after", facts))
        if fine_tune is not None:
            fine_tune(network, entry.algorithm)
    return network.eval() if network is not model else network


def _by_create_compressed_model(
    model: nn.Module,
    loaded: dict[str, Any],
    calibration_data: Iterable[Any] | None,
    loss_fn: Callable[[Any, Any], Any] | None,
    fine_tune: Callable[[nn.Module, Any], None] | None,
    report: Callable[[SectionReport], None],
    installed: tuple[int, int],
    reports: list[SectionReport],
) -> Compressed:
    require_legacy_tracing(installed)
    import nncf.torch
    from nncf import NNCFConfig
    from nncf.config.structures import BNAdaptationInitArgs, QuantizationRangeInitArgs

    from .nncf_v2 import register
    from .nncf_v2_data import BatchLoader

    register()
    config = NNCFConfig.from_dict(loaded)
    if calibration_data is not None:
        loader = BatchLoader(calibration_data)
        config.register_extra_structs([QuantizationRangeInitArgs(loader), BNAdaptationInitArgs(loader)])
    controller, network = nncf.torch.create_compressed_model(model, config, dump_graphs=False)
    for name, statistics in controller.statistics():
        report(SectionReport(name, statistics.to_str(), {}))
    if fine_tune is not None:
        fine_tune(network, controller)
    path = f"NNCF {installed[0]}.{installed[1]}: create_compressed_model"
    return Compressed(network.eval(), path, tuple(reports), controller)


def require_legacy_tracing(installed: tuple[int, int]) -> None:
    """Switch NNCF's legacy tracing on where that is still possible.

    Raises:
        ConfigError: NNCF was imported without it.
    """
    if installed < (2, 17):
        return
    if "nncf" not in sys.modules and LEGACY_TRACING not in os.environ:
        _log.info("%s=1: create_compressed_model of NNCF %d.%d needs it", LEGACY_TRACING, *installed)
        os.environ[LEGACY_TRACING] = "1"
    import nncf.torch  # noqa: F401
    from nncf.torch.dynamic_graph.patch_pytorch_state import PATCHING_STATE

    if not PATCHING_STATE.operators_are_wrapped:
        raise ConfigError(
            f"NNCF {installed[0]}.{installed[1]} was imported without legacy tracing, which "
            f"create_compressed_model needs. Set {LEGACY_TRACING}=1 before the process imports nncf, or call "
            "sigmab_plugin.hosts.nncf_v3.compress, which uses NNCF's functions instead."
        )
