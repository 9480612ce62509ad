"""NNCF by functions (3.0 to 3.4, and 2.17 to 2.19 without legacy tracing): one call carries a config file out.

:func:`compress` maps each section, in the order of the list:

=====================  ==========================================================================
section                what runs
=====================  ==========================================================================
any technique          the entry point of the group ``nncf.algorithms`` (``sigmab``, ...)
``quantization``       ``nncf.quantize``
``weight_compression`` ``nncf.compress_weights``
``magnitude_sparsity`` ``nncf.prune`` (masks)
``filter_pruning``     Torch-Pruning (filters leave the network; NNCF's functions have no counterpart)
=====================  ==========================================================================

A SigmaB net is handled part by part: backbone, every router, specializer and head is quantized on the samples that
reach it in hard routing, and carries its own hooks. So they act in every use of a part, in training and in export, not
only in a call of the whole net.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CalibrationError, ConfigError
from ..techniques.base import Context
from ..tree.net import SigmaBNet
from .nncf_needs import ARGUMENTS, check_needs
from .nncf_schema import Section, as_list, check, hide_untraced, read
from .nncf_v3_parts import CalibrationInputs, as_inputs
from .nncf_v3_scopes import check_scopes
from .nncf_v3_sections import Run, check_model, runner_of
from .nncf_v3_state import get_config, load, load_from_config, save, strip

__all__ = [
    "SectionReport",
    "compress",
    "get_config",
    "load",
    "load_from_config",
    "save",
    "strip",
]

_log = logging.getLogger(__name__)

FineTune = Callable[[nn.Module, str], None]


@dataclass(frozen=True)
class SectionReport:
    """What one section did. ``text`` is for people, ``facts`` for machines."""

    section: str
    text: str
    facts: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.section}: {self.text}"


def compress(
    model: nn.Module,
    config: Mapping[str, Any] | str | Path,
    calibration_dataset: Any = None,
    *,
    example_inputs: Any = None,
    train_data: Any = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    fine_tune: FineTune | None = None,
    on_section: Callable[[SectionReport], None] | None = None,
    per_leaf_calibration: bool = True,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Carry out every section of an NNCF config file; ``model`` is left as it was.

    Args:
        model: the trained network, or a SigmaB net if the file has no ``sigmab`` section.
        config: the file's path, or its content.
        calibration_dataset: ``nncf.Dataset`` whose transform gives the model's inputs (a tuple is splatted), or a
            re-iterable of inputs.
        example_inputs: one batch of inputs; default: the first of the calibration dataset.
        train_data, loss_fn, validate: for techniques that fine-tune or choose, see
            :class:`~sigmab_plugin.techniques.base.Context`.
        fine_tune: ``fine_tune(network, algorithm)`` after each section that a training pass should follow: after
            ``sigmab`` the routed net is trained before it is quantized, after ``quantization`` this is
            quantization-aware training.
        on_section: receives a :class:`SectionReport` after each section.
        per_leaf_calibration: calibrate each part of a SigmaB net with the samples that reach it (False: with all).
        options: further keyword arguments of a technique, by its name.

    Returns:
        The compressed network, in eval mode; pass it to :func:`strip` before deployment.

    Raises:
        SectionError, ConfigError: the file cannot be carried out; nothing has run yet.
        CalibrationError: data that a section needs, or ``validate``, is missing; nothing has run yet.
    """
    loaded = read(config)
    entries = check(loaded)
    runners = [runner_of(entry) for entry in entries]
    check_model(model, loaded, entries)
    given = {"validate": validate, "train_data": train_data, "calibration_data": calibration_dataset}
    check_needs(entries, given, how=ARGUMENTS, tree=isinstance(model, SigmaBNet))
    needs_data = [str(e) for e in entries if e.algorithm in ("sigmab", "quantization")]
    if calibration_dataset is None and needs_data:
        raise CalibrationError(
            f"{', '.join(needs_data)} needs calibration data: pass calibration_dataset=nncf.Dataset(loader, transform)"
        )
    data = None if calibration_dataset is None else CalibrationInputs(calibration_dataset)
    example = (
        as_inputs(example_inputs)
        if example_inputs is not None
        else (data.first() if data is not None else None)
    )
    if example is None:
        raise ConfigError(
            "example_inputs is needed where there is no calibration_dataset: one batch of inputs"
        )
    run = Run(
        scopes=tuple(as_list(loaded.get("ignored_scopes"))),
        root=type(model).__name__,
        known=frozenset(),
        target_device=str(loaded.get("target_device", "ANY")),
        example=example,
        data=data,
        per_leaf=per_leaf_calibration,
        context=Context(
            example_inputs=example,
            calibration_data=data,
            train_data=train_data,
            loss_fn=loss_fn,
            validate=validate,
            seed=seed,
            options=dict(options or {}),
        ),
    )
    hide_untraced(model)
    network = model
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        if example_inputs is None:
            _check_runs(model, example)
        run = replace(run, known=_found_scopes(model, entries, run))
        for entry, runner in zip(entries, runners, strict=True):
            network.eval()
            network, text, facts = runner(network, entry, run)
            if on_section is not None:
                on_section(SectionReport(str(entry), text, facts))
            if fine_tune is not None and network is not model:
                fine_tune(network, entry.algorithm)
    finally:
        for module, training in modes:
            module.training = training
    return network.eval() if network is not model else network


def _check_runs(model: nn.Module, example: tuple[Any, ...]) -> None:
    """NNCF's datasets hand on what a loader yields, targets too, unless a transform takes them off."""
    try:
        with torch.no_grad():
            model(*example)
    except Exception as error:
        raise CalibrationError(
            f"the model does not run on the first item of calibration_dataset ({type(error).__name__}: {error}): it "
            "must give the model's inputs alone, for example nncf.Dataset(loader, lambda batch: batch[0])"
        ) from error


def _found_scopes(model: nn.Module, entries: Sequence[Section], run: Run) -> frozenset[str]:
    """Scopes that name something in ``model``; raises where those of a section before any technique do not."""
    readers = [run.scopes_of(entry) for entry in entries if entry.technique is None]
    first = next((entry.position for entry in entries if entry.technique is not None), len(entries))
    return frozenset(check_scopes(model, readers, run.example, first))
