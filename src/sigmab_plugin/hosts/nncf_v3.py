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

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CalibrationError, ConfigError, ModelError
from ..techniques.base import Context
from ..tree.net import SigmaBNet
from .nncf_schema import Section, SectionError, check, covered_levels, hide_untraced, read, unknown_modules
from .nncf_v3_parts import Part, change_parts, wrap_parts

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
        CalibrationError: calibration data is needed and missing.
    """
    loaded = read(config)
    entries = check(loaded)
    runners = [_runner(entry) for entry in entries]
    _check_model(model, loaded, entries)
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
        scopes=tuple(_as_list(loaded.get("ignored_scopes"))),
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
    was_training = model.training
    try:
        for entry, runner in zip(entries, runners, strict=True):
            network.eval()
            network, text, facts = runner(network, entry, run)
            if on_section is not None:
                on_section(SectionReport(str(entry), text, facts))
            if fine_tune is not None and network is not model:
                fine_tune(network, entry.algorithm)
    finally:
        model.train(was_training)
    return network.eval() if network is not model else network


@dataclass(frozen=True)
class Run:
    """What all sections of one call share."""

    scopes: tuple[str, ...]
    target_device: str
    example: tuple[Any, ...]
    data: CalibrationInputs | None
    per_leaf: bool
    context: Context


Runner = Callable[[nn.Module, Section, Run], tuple[nn.Module, str, dict[str, Any]]]


class CalibrationInputs:
    """The model's inputs of each calibration batch, from an ``nncf.Dataset`` or a re-iterable."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._is_nncf = hasattr(dataset, "get_inference_data")
        if not self._is_nncf and iter(dataset) is dataset:
            raise CalibrationError(
                "calibration_dataset is a one-shot iterator, and it is read several times: give an nncf.Dataset"
            )

    def __iter__(self) -> Iterator[Any]:
        source = self._dataset.get_inference_data() if self._is_nncf else self._dataset
        for item in source:
            if isinstance(item, dict):
                raise CalibrationError(
                    "calibration inputs by keyword are not supported: give a tensor or a tuple"
                )
            yield item

    def first(self) -> tuple[Any, ...]:
        for item in self:
            return as_inputs(item)
        raise CalibrationError("the calibration dataset is empty")


def as_inputs(item: Any) -> tuple[Any, ...]:
    return tuple(item) if isinstance(item, (tuple, list)) else (item,)


# ---------------------------------------------------------------- sections


def _runner(entry: Section) -> Runner:
    if entry.technique is not None:
        return _technique
    runners: dict[str, Runner] = {
        "quantization": _quantize,
        "weight_compression": _compress_weights,
        "magnitude_sparsity": _magnitude_sparsity,
        "filter_pruning": _filter_pruning,
    }
    if entry.algorithm not in runners:
        raise SectionError(
            f"{entry}: not available through NNCF's functions. Supported here: "
            f"{', '.join(sorted(runners))}, and the installed techniques. NNCF 2.x has it in create_compressed_model."
        )
    known = _KEYS[entry.algorithm]
    for key in entry.values:
        if key not in known:
            raise SectionError(f"{entry}: unknown key {key!r}. Known keys: {', '.join(sorted(known))}.")
    _check_values(entry)
    return runners[entry.algorithm]


def _check_values(entry: Section) -> None:
    """Read the section's values now, so that a wrong one stops the call before anything has run."""
    from .nncf_v3_parts import pruning_arguments, quantization_arguments, weight_compression_arguments

    if entry.algorithm == "quantization":
        quantization_arguments(entry, (), "ANY")
    elif entry.algorithm == "weight_compression":
        weight_compression_arguments(entry, ())
    elif entry.algorithm == "magnitude_sparsity":
        sparsity_target(entry)
    else:
        pruning_arguments(entry)


_COMMON = {"algorithm", "ignored_scopes"}
_KEYS = {
    "quantization": {
        *_COMMON, "preset", "initializer", "weights", "activations", "overflow_fix", "export_to_onnx_standard_ops",
        "quantize_inputs", "quantize_outputs", "subset_size", "model_type", "target_scopes", "validate_scopes",
        "scope_overrides", "compression_lr_multiplier",
    },
    "weight_compression": {
        *_COMMON, "mode", "ratio", "group_size", "all_layers", "sensitivity_metric", "awq", "subset_size",
        "scale_estimation", "gptq", "lora_correction", "backup_mode",
    },
    "magnitude_sparsity": {*_COMMON, "sparsity_init", "params", "initializer", "target_scopes", "validate_scopes"},
    "filter_pruning": {*_COMMON, "pruning_init", "params", "initializer", "target_scopes", "validate_scopes"},
}  # fmt: skip


def _check_model(model: nn.Module, config: Mapping[str, Any], entries: tuple[Section, ...]) -> None:
    for entry in entries:
        if entry.algorithm == "sigmab":
            if isinstance(model, SigmaBNet):
                raise ModelError(f"{entry}: the model is a SigmaB net already; give the dense network")
            values: Any = entry.config
            names = (*values.levels, values.head)
            missing = unknown_modules(model, names)
            if missing:
                raise ConfigError(f"{entry}: {missing}. Is this config for another model?")
            covered = covered_levels(model, _as_list(config.get("ignored_scopes")), names)
            if covered:
                raise ConfigError(
                    f"ignored_scopes cover {', '.join(map(repr, covered))}, which sigmab is to restructure. Scopes at "
                    "the top of the file hold for every algorithm; move them into the section that is to ignore the "
                    "layers."
                )
    names_in_order = [entry.algorithm for entry in entries]
    if "filter_pruning" in names_in_order:
        after_tree = names_in_order.index("filter_pruning") > (
            names_in_order.index("sigmab") if "sigmab" in names_in_order else len(entries)
        )
        if after_tree or isinstance(model, SigmaBNet):
            raise SectionError(
                "filter_pruning after sigmab: the branches have been cut to their width already. Put it before sigmab, "
                "or use sigmab's 'active_ratio' for a narrower net."
            )
        if any(
            name in ("quantization", "weight_compression")
            for name in names_in_order[: names_in_order.index("filter_pruning")]
        ):
            raise SectionError(
                "filter_pruning after quantization: filters are removed first, then the rest is quantized"
            )


def _technique(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    assert entry.technique is not None
    dense = baked(network, run.example)
    before = sum(p.numel() for p in dense.parameters())
    result = entry.technique.apply(dense, entry.config, run.context)
    if isinstance(result, SigmaBNet):
        counts = result.parameter_counts()
        facts: dict[str, Any] = {"dense": before, "stored": counts.total, "active": counts.active}
        text = (
            f"{before:,} parameters became {counts.total:,} stored, {counts.active:,} active "
            f"({100 * counts.active / before:.1f} % of dense), {len(result.leaves)} leaves"
        )
        return result, text, facts
    after = sum(p.numel() for p in result.parameters())
    return result, f"{before:,} parameters before, {after:,} after", {"before": before, "after": after}


def _quantize(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    import nncf

    from .nncf_v3_parts import quantization_arguments

    arguments, samples = quantization_arguments(entry, run.scopes, run.target_device)
    result = wrap_parts(network)
    assert run.data is not None

    def quantize(part: Part) -> nn.Module:
        source = part.batches(samples)
        quantized: nn.Module = nncf.quantize(
            part.module, nncf.Dataset(source), subset_size=len(source), **arguments(part)
        )
        return quantized

    result, count = _each_part(result, run, quantize)
    where = "each on the samples that reach it" if run.per_leaf and len(count) > 1 else "on all samples"
    quantizers = _hooks(result)
    text = f"{quantizers} quantizers in {len(count)} part(s), calibrated {where} (up to {samples})"
    return result, text, {"quantizers": quantizers, "samples": count}


def _each_part(
    network: nn.Module, run: Run, change: Callable[[Part], nn.Module]
) -> tuple[nn.Module, dict[str, int]]:
    return change_parts(network, run.data or [run.example], change, per_leaf=run.per_leaf)


def _compress_weights(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    import nncf

    from .nncf_v3_parts import weight_compression_arguments

    arguments = weight_compression_arguments(entry, run.scopes)
    result = wrap_parts(network)
    before = sum(t.numel() * t.element_size() for t in result.state_dict().values())

    def reduce(part: Part) -> nn.Module:
        source = part.batches(int(entry.values.get("subset_size", 128)))
        compressed: nn.Module = nncf.compress_weights(
            part.module, dataset=nncf.Dataset(source), **arguments(part)
        )
        return compressed

    result, _ = _each_part(result, run, reduce)
    after = sum(t.numel() * t.element_size() for t in result.state_dict().values())
    return (
        result,
        f"{before:,} bytes of weights became {after:,}",
        {"bytes_before": before, "bytes_after": after},
    )


def _magnitude_sparsity(
    network: nn.Module, entry: Section, run: Run
) -> tuple[nn.Module, str, dict[str, Any]]:
    import nncf

    from .nncf_v3_parts import ignored_scope, part_ratios

    if not hasattr(nncf, "prune"):
        raise SectionError(f"{entry}: this NNCF has no nncf.prune; it comes with NNCF 2.19")
    ratio = sparsity_target(entry)
    everywhere = entry.values.get("params", {}).get("weight_importance", "normed_abs") == "abs"
    result = wrap_parts(network)
    ratios = part_ratios(result, ratio) if everywhere else {}
    mode = (
        nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        if everywhere
        else nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    )

    def mask(part: Part) -> nn.Module:
        own = ratios.get(part.name, ratio)
        # A router is one or two per cent of a path's weights and decides where every sample goes: it keeps them all.
        if part.is_router or not 0.0 < own < 1.0:
            return part.module
        pruned: nn.Module = nncf.prune(
            part.module,
            mode=mode,
            ratio=own,
            ignored_scope=ignored_scope(part, entry, run.scopes),
            examples_inputs=part.example,
        )
        return pruned

    result, count = _each_part(result, run, mask)
    scope = "one threshold for the whole network" if everywhere else "in every layer"
    text = f"{100 * ratio:.0f} % of the weights masked by magnitude, {scope}, in {len(count)} part(s)"
    return result, text, {"ratio": ratio, "parts": len(count)}


def sparsity_target(entry: Section) -> float:
    """The sparsity at which the schedule of a 2.x section ends."""
    params = entry.values.get("params", {})
    levels = params.get("multistep_sparsity_levels")
    target = params.get("sparsity_target", levels[-1] if levels else 0.5)
    if not 0.0 < target < 1.0:
        raise SectionError(f"{entry}: the target sparsity must lie between 0 and 1; got {target}")
    return float(target)


def _filter_pruning(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    from .nncf_v3_parts import prune_filters

    dense = baked(network, run.example)
    before = sum(p.numel() for p in dense.parameters())
    result, ratio = prune_filters(dense, entry, run.scopes, run.example)
    after = sum(p.numel() for p in result.parameters())
    text = f"Torch-Pruning removed {100 * ratio:.0f} % of the filters: {before:,} parameters became {after:,}"
    return result, text, {"before": before, "after": after, "ratio": ratio}


def baked(network: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """``network`` with masks and quantizers fixed in its weights and no hooks; itself if it has none."""
    from .nncf_v3_parts import is_wrapped, unwrapped_weights

    return unwrapped_weights(network) if is_wrapped(network) else network


def _hooks(network: nn.Module) -> int:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    from .nncf_v3_parts import is_wrapped, wrapped_parts

    return sum(
        len({id(hook) for _, hook in get_hook_storage(module).named_hooks()})
        for _, module in wrapped_parts(network)
        if is_wrapped(module)
    )


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


# ---------------------------------------------------------------- after compression


def strip(network: nn.Module, example_inputs: Any, *, do_copy: bool = True) -> nn.Module:
    """``nncf.strip`` for every part: quantizers become torch's own, masks are applied to the weights.

    Args:
        example_inputs: one batch of the network's inputs.
    """
    import nncf

    from .nncf_v3_parts import is_wrapped

    result = copy.deepcopy(network) if do_copy else network

    def strip_part(part: Part) -> nn.Module:
        if not is_wrapped(part.module):
            return part.module
        stripped: nn.Module = nncf.strip(part.module, do_copy=False, example_input=part.example)
        return stripped

    return change_parts(result, [as_inputs(example_inputs)], strip_part, per_leaf=False)[0]


def get_config(network: nn.Module) -> dict[str, Any]:
    """What NNCF has added to ``network``, as JSON types; :func:`load_from_config` adds it again.

    For a network that is no SigmaB net this holds ``nncf.torch.get_config``'s result under the part ``""``.

    Raises:
        ModelError: NNCF has no config for what it has added (``compress_weights``).
    """
    import nncf.torch

    from .nncf_v3_parts import is_wrapped, wrapped_parts

    described = {}
    for name, module in wrapped_parts(network):
        if is_wrapped(module):
            try:
                described[name] = nncf.torch.get_config(module)
            except nncf.InternalError as error:
                raise ModelError(
                    f"NNCF cannot describe what it has added to {name or 'the network'!r}: {error} After "
                    "weight_compression keep the network before it, and compress again."
                ) from error
    return {"format": "sigmab-nncf", "version": 1, "parts": described}


def load_from_config(
    network: nn.Module, config: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> nn.Module:
    """Add to ``network``, in place, what :func:`get_config` found in another of the same structure.

    Args:
        network: the network before quantization, for example ``sigmab_plugin.load(directory, dense)``.
        state: the compressed network's ``state_dict``; loaded bit for bit, data types included.
    """
    import nncf.torch

    from ..errors import FormatError
    from .nncf_v3_parts import wrapped_parts

    if config.get("format") != "sigmab-nncf":
        raise FormatError(f"not a config written by get_config: format is {config.get('format')!r}")
    if config.get("version") != 1:
        raise FormatError(f"config version {config.get('version')}: this package reads version 1; upgrade it")
    result = wrap_parts(network, copy_network=False)
    known = dict(wrapped_parts(result))
    for name, entry in config["parts"].items():
        if name not in known:
            raise FormatError(
                f"the config holds a part {name!r} that the network does not have: another model?"
            )
        nncf.torch.load_from_config(known[name], entry)
    if state is not None:
        result.load_state_dict(state, assign=True)
    return result


def save(network: SigmaBNet, directory: str | Path) -> Path:
    """Plan, NNCF config and weights of a compressed SigmaB net, side by side; no pickle."""
    import json

    from ..tree.io import save as save_net

    target = save_net(network, directory)
    (target / "nncf.json").write_text(json.dumps(get_config(network), indent=1) + "\n", encoding="utf-8")
    return target


def load(directory: str | Path, dense_model: nn.Module) -> SigmaBNet:
    """Read what :func:`save` wrote, bit for bit."""
    import json

    from safetensors.torch import load_file

    from ..tree.io import assemble, read_plan

    target = Path(directory)
    config = json.loads((target / "nncf.json").read_text(encoding="utf-8"))
    network = assemble(read_plan(target), dense_model)
    restored = load_from_config(network, config, load_file(target / "model.safetensors"))
    assert isinstance(restored, SigmaBNet)
    return restored.eval()
