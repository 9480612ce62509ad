"""One NNCF config file, any NNCF: the path is chosen by what is installed.

* NNCF 2.x: ``NNCFConfig`` and ``create_compressed_model`` (needs legacy tracing from 2.17 on);
* NNCF 3.x, and 2.x for sections that its config files do not have: :func:`sigmab_plugin.hosts.nncf_v3.compress`;
* no NNCF: files with techniques of ours only.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import CalibrationError, ConfigError, MissingDependencyError
from ..techniques.base import Context
from .nncf_folder import SavedFile, write
from .nncf_needs import ARGUMENTS, check_needs
from .nncf_outcome import outcome
from .nncf_schema import Section, SectionError, check, nncf_version, read
from .nncf_v3 import SectionReport
from .nncf_v3_parts import as_inputs
from .nncf_v3_sections import FUNCTION_ALGORITHMS

_log = logging.getLogger(__name__)

LEGACY_TRACING = "NNCF_TORCH_LEGACY_TRACING"
#: What NNCF 2.x has in its functions and not in its config files.
FUNCTIONS_ONLY = ("weight_compression",)


@dataclass(frozen=True)
class Way:
    """How a file is carried out here: ``name`` for tables, and the reason for it in half a sentence."""

    kind: Literal["config file", "functions", "techniques"]
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def way_of(entries: Sequence[Section]) -> Way:
    """Which way the installed NNCF allows for these sections.

    Raises:
        MissingDependencyError: a section needs NNCF and there is none.
        ConfigError: a section needs another NNCF than the installed one.
    """
    own = [entry for entry in entries if entry.technique is None]
    functions_only = next((entry for entry in own if entry.algorithm in FUNCTIONS_ONLY), None)
    try:
        installed = nncf_version()
    except MissingDependencyError:
        if own:
            fits = "sigmab-plugin[nncf]" if own[0].algorithm in FUNCTION_ALGORITHMS else "nncf>=2.17,<3"
            raise MissingDependencyError(
                f"{own[0]} needs NNCF, which is not installed: pip install '{fits}'"
            ) from None
        return Way("techniques", NO_NNCF, "the file asks for nothing of NNCF's own")
    version = f"NNCF {installed[0]}.{installed[1]}"
    if installed[0] >= 3:
        other = next((entry for entry in own if entry.algorithm not in FUNCTION_ALGORITHMS), None)
        if other is not None:
            raise SectionError(
                f"{other} is not available through {version}'s functions ({', '.join(FUNCTION_ALGORITHMS)} are): "
                "pip install 'nncf>=2.17,<3', which has it in config files"
            )
        return Way(
            "functions", f"{version}: functions", "NNCF 3 has no config files, so nncf_v3.compress reads it"
        )
    if functions_only is None:
        return Way("config file", f"{version}: create_compressed_model", "NNCF 2 reads config files itself")
    if installed < (2, 17):
        raise SectionError(f"{functions_only} is in no config file of {version}: pip install 'nncf>=2.17'")
    if os.environ.get(LEGACY_TRACING):
        raise SectionError(
            f"{functions_only} is in no config file of NNCF 2.x, and its functions do not work with legacy tracing: "
            f"start the process without {LEGACY_TRACING}"
        )
    return Way(
        "functions",
        f"{version}: functions",
        f"config files of NNCF 2.x have no {functions_only.algorithm}, its functions do",
    )


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress_from_file` made.

    Attributes:
        network: the compressed network, in eval mode.
        path: which way was taken: ``"NNCF 3.4: functions"``.
        reports: what each section did.
        controller: NNCF 2.x's compression controller; None on the other paths.
        plain: the last section is a technique, so that nothing of NNCF's is left in the network: what stood before
            is fixed in the weights.
    """

    network: nn.Module
    path: str
    reports: tuple[SectionReport, ...]
    controller: Any = None
    plain: bool = False

    def save(self, directory: str | Path) -> tuple[SavedFile, ...]:
        """Weights by safetensors, what rebuilds the structure, and what else the techniques found; returns the files.

        Where NNCF has added nothing that is still in the network, the folder is the same for every NNCF and without
        one: a tree as :func:`sigmab_plugin.load` reads it, a depth-pruned network as ``load_depth_pruned`` does,
        anything else as a plain state dict. Otherwise ``nncf.json`` (functions) is read by
        ``nncf_v3.load_from_config``, and ``compression_state.json`` (2.x) is what
        ``create_compressed_model(compression_state=...)`` takes. LegoNet's packed form is ``legonet.safetensors``,
        Mix-and-Match's table of runs ``mix_and_match.json``.
        """
        return write(self.network, Path(directory), plain=self.plain, controller=self.controller)


NO_NNCF = "no NNCF installed: techniques of this package only"


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
        train_data: re-iterable of ``(inputs, targets)``; default: the calibration data, as in NNCF 2.x.
        validate: ``validate(network)`` -> score on held-out data, for sections that make a choice.
        on_section: receives a report after each section, as it finishes.

    Raises:
        ConfigError: the file cannot be carried out here; nothing has run yet.
        CalibrationError: a section needs data or ``validate``, which are not given; nothing has run yet.
        MissingDependencyError: the file needs NNCF and there is none.
    """
    loaded = read(config)
    entries = check(loaded)
    way = way_of(entries)
    if train_data is None:
        train_data = calibration_data
    given = {"validate": validate, "train_data": train_data, "calibration_data": calibration_data}
    check_needs(entries, given, how=ARGUMENTS, tree=hasattr(model, "forward_leaves"))
    reports: list[SectionReport] = []

    def report(entry: SectionReport) -> None:
        reports.append(entry)
        if on_section is not None:
            on_section(entry)

    controller = None
    if way.kind == "techniques":
        context = Context(
            example_inputs=example_inputs,
            calibration_data=_inputs_of(calibration_data),
            train_data=train_data,
            loss_fn=loss_fn,
            validate=validate,
            seed=seed,
        )
        network = _techniques_only(model, entries, context, fine_tune, report)
    elif way.kind == "config file":
        data = _Registered(calibration_data, train_data, loss_fn, validate)
        controller, network = _by_create_compressed_model(model, loaded, entries, data, report)
        if fine_tune is not None:
            fine_tune(network, controller)
        network.eval()
    else:
        import nncf

        from .nncf_v3 import compress

        network = compress(
            model,
            loaded,
            None if calibration_data is None else nncf.Dataset(calibration_data, _inputs),
            example_inputs=example_inputs,
            train_data=train_data,
            loss_fn=loss_fn,
            validate=validate,
            fine_tune=fine_tune,
            on_section=report,
            seed=seed,
        )
    plain = all(entry.technique is not None for entry in entries[-1:])
    return Compressed(network, way.name, tuple(reports), controller, plain)


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
        before = network
        network = entry.technique.apply(before, entry.config, context)
        report(SectionReport(str(entry), *outcome(before, network)))
        if fine_tune is not None:
            fine_tune(network, entry.algorithm)
    return network.eval() if network is not model else network


@dataclass(frozen=True)
class _Registered:
    """What is registered with NNCF 2.x's config."""

    calibration_data: Iterable[Any] | None
    train_data: Iterable[Any] | None
    loss_fn: Callable[[Any, Any], Any] | None
    validate: Callable[[nn.Module], float] | None


def _by_create_compressed_model(
    model: nn.Module,
    loaded: dict[str, Any],
    entries: Sequence[Section],
    data: _Registered,
    report: Callable[[SectionReport], None],
) -> tuple[Any, nn.Module]:
    require_legacy_tracing(nncf_version())
    import nncf.torch
    from nncf import NNCFConfig

    from .nncf_v2 import register
    from .nncf_v2_data import extra_structs
    from .nncf_v2_statistics import summary

    register()
    config = NNCFConfig.from_dict(with_input_info(loaded, data.calibration_data))
    config.register_extra_structs(
        extra_structs(
            data.calibration_data, train_data=data.train_data, loss_fn=data.loss_fn, validate=data.validate
        )
    )
    controller, network = nncf.torch.create_compressed_model(model, config, dump_graphs=False)
    known = dict(controller.statistics())
    for entry in entries:
        if entry.algorithm in known:
            report(SectionReport(str(entry), *summary(known[entry.algorithm])))
        else:
            report(SectionReport(str(entry), "no statistics: it acts on the loss in training", {}))
    return controller, network


def with_input_info(loaded: dict[str, Any], calibration_data: Iterable[Any] | None) -> dict[str, Any]:
    """``loaded`` with an ``input_info`` that has as many inputs, of as many dimensions, as the data.

    NNCF 2.x traces the model with random inputs of these shapes. A file may have been written for another form of the
    same input (point clouds as one padded tensor, or as points with the cloud of each).
    """
    first = next(iter(calibration_data), None) if calibration_data is not None else None
    if first is None:
        return loaded
    inputs = as_inputs(_inputs(first))
    if not all(torch.is_tensor(value) for value in inputs):
        return loaded
    given = loaded.get("input_info")
    listed = [given] if isinstance(given, Mapping) else list(given or ())
    ranks = [len(entry.get("sample_size", ())) for entry in listed]
    if ranks == [value.ndim for value in inputs]:
        return loaded
    if len(inputs) == 1:
        shapes = [[min(2, len(inputs[0])), *inputs[0].shape[1:]]]
    else:  # rows of one input may belong to rows of another
        shapes = [list(value.shape) for value in inputs]
    described = [
        {"sample_size": shape}
        if value.is_floating_point()
        else {"sample_size": shape, "type": "long", "filler": "zeros"}
        for shape, value in zip(shapes, inputs, strict=True)
    ]
    if listed:
        _log.info("input_info is taken from the data: the file has dimensions %s", ranks)
    return {**loaded, "input_info": described}


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
