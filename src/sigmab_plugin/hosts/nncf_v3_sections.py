"""What each section of a config file runs, where NNCF is used by its functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError
from ..techniques.base import Context
from ..techniques.compose import QUANTIZING
from ..tree.net import SigmaBNet
from .nncf_outcome import outcome
from .nncf_schema import Section, SectionError, check_levels
from .nncf_v3_arguments import (
    device_of,
    mapping,
    number,
    part_ratios,
    prune_filters,
    pruning_arguments,
    quantization_arguments,
    warn_unused,
    weight_compression_arguments,
)
from .nncf_v3_parts import (
    CalibrationInputs,
    Part,
    change_parts,
    is_wrapped,
    unwrapped_weights,
    wrap_parts,
    wrapped_parts,
)
from .nncf_v3_scopes import SectionScopes, layers_of, operation_names


@dataclass(frozen=True)
class Run:
    """What all sections of one call share.

    Attributes:
        root: class of the network that the file was written for.
        known: scopes that were found in that network.
    """

    scopes: tuple[str, ...]
    root: str
    known: frozenset[str]
    target_device: str
    example: tuple[Any, ...]
    data: CalibrationInputs | None
    per_leaf: bool
    context: Context

    def scopes_of(self, entry: Section) -> SectionScopes:
        return SectionScopes(entry, self.scopes, self.root)


Runner = Callable[[nn.Module, Section, Run], tuple[nn.Module, str, dict[str, Any]]]


def runner_of(entry: Section) -> Runner:
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
    scopes = SectionScopes(entry, (), "")
    if entry.algorithm == "quantization":
        quantization_arguments(entry, scopes, "ANY")
        warn_unused(entry)
    elif entry.algorithm == "weight_compression":
        weight_compression_arguments(entry, scopes)
    elif entry.algorithm == "magnitude_sparsity":
        sparsity_target(entry)
    else:
        pruning_arguments(entry)


#: NNCF's own algorithms that its functions (or Torch-Pruning) carry out.
FUNCTION_ALGORITHMS = ("filter_pruning", "magnitude_sparsity", "quantization", "weight_compression")
_COMMON = {"algorithm", "ignored_scopes"}
_KEYS = {
    "quantization": {
        *_COMMON, "preset", "initializer", "weights", "activations", "overflow_fix", "export_to_onnx_standard_ops",
        "quantize_inputs", "quantize_outputs", "subset_size", "model_type", "target_scopes", "validate_scopes",
        "scope_overrides", "compression_lr_multiplier",
    },
    "weight_compression": {
        *_COMMON, "mode", "ratio", "group_size", "all_layers", "sensitivity_metric", "awq", "subset_size",
        "scale_estimation", "gptq", "lora_correction", "backup_mode", "validate_scopes",
    },
    "magnitude_sparsity": {*_COMMON, "sparsity_init", "params", "initializer", "target_scopes", "validate_scopes"},
    "filter_pruning": {*_COMMON, "pruning_init", "params", "initializer", "target_scopes", "validate_scopes"},
}  # fmt: skip


def check_model(model: nn.Module, config: Mapping[str, Any], entries: tuple[Section, ...]) -> None:
    for entry in entries:
        if entry.algorithm == "sigmab" and isinstance(model, SigmaBNet):
            raise ModelError(f"{entry}: the model is a SigmaB net already; give the dense network")
    check_levels(entries, model, config)
    device_of(str(config.get("target_device", "ANY")))
    for entry in entries:
        if entry.algorithm == "magnitude_sparsity" and any(
            earlier.algorithm == "weight_compression" for earlier in entries[: entry.position]
        ):
            raise SectionError(
                f"{entry} after weight_compression: the weights are integers by then, which NNCF does not prune. Put "
                "magnitude_sparsity first."
            )
    for entry in entries:
        if entry.algorithm != "filter_pruning":
            continue
        if isinstance(model, SigmaBNet):
            raise SectionError(
                f"{entry}: the model is a SigmaB net, whose branches have been cut to their width already. Prune the "
                "dense network and restructure it then: filter_pruning before sigmab in one file."
            )
        if any(earlier.algorithm in QUANTIZING for earlier in entries[: entry.position]):
            raise SectionError(
                "filter_pruning after quantization: filters are removed first, then the rest is quantized"
            )


def _technique(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    assert entry.technique is not None
    dense = baked(network, run.example)
    result = entry.technique.apply(dense, entry.config, run.context)
    return result, *outcome(dense, result)


def _quantize(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    import nncf

    scopes = run.scopes_of(entry)
    arguments, samples = quantization_arguments(entry, scopes, run.target_device)
    result = wrap_parts(network)
    assert run.data is not None

    def quantize(part: Part) -> nn.Module:
        source = part.batches(samples)
        given = arguments(part)
        try:
            quantized: nn.Module = nncf.quantize(
                part.module, nncf.Dataset(source), subset_size=len(source), **given
            )
        except (ValueError, nncf.ValidationError) as error:
            # what the section asks of the quantizers, against what the device has
            if not any(mapping(entry, side) for side in ("weights", "activations")):
                raise
            raise SectionError(f"{entry}: weights, activations: {' '.join(str(error).split())}") from error
        return quantized

    result, count = _each_part(result, run, quantize)
    scopes.check(run.known)
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

    scopes = run.scopes_of(entry)
    arguments = weight_compression_arguments(entry, scopes)
    result = wrap_parts(network)
    before = sum(t.numel() * t.element_size() for t in result.state_dict().values())

    def reduce(part: Part) -> nn.Module:
        source = part.batches(int(entry.values.get("subset_size", 128)))
        compressed: nn.Module = nncf.compress_weights(
            part.module, dataset=nncf.Dataset(source), **arguments(part)
        )
        return compressed

    result, _ = _each_part(result, run, reduce)
    scopes.check(run.known)
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

    if not hasattr(nncf, "prune"):
        raise SectionError(f"{entry}: this NNCF has no nncf.prune; it comes with NNCF 2.19")
    ratio = sparsity_target(entry)
    scopes = run.scopes_of(entry)
    everywhere = mapping(entry, "params").get("weight_importance", "normed_abs") == "abs"
    result = wrap_parts(network)
    ratios = part_ratios(result, ratio) if everywhere else {}
    mode = (
        nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL
        if everywhere
        else nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL
    )

    def mask(part: Part) -> nn.Module:
        own = ratios.get(part.name, ratio)
        ignored = scopes.ignored_scope(part)
        # A router is one or two per cent of a path's weights and decides where every sample goes: it keeps them all.
        if part.is_router or not 0.0 < own < 1.0:
            return part.module
        if scopes and not _weighted(part, ignored):
            return part.module
        pruned: nn.Module = nncf.prune(
            part.module,
            mode=mode,
            ratio=own,
            ignored_scope=ignored,
            examples_inputs=part.example,
        )
        return pruned

    result, count = _each_part(result, run, mask)
    scopes.check(run.known)
    scope = "one threshold for the whole network" if everywhere else "in every layer"
    text = f"{100 * ratio:.0f} % of the weights masked by magnitude, {scope}, in {len(count)} part(s)"
    return result, text, {"ratio": ratio, "parts": len(count)}


def _weighted(part: Part, ignored: Any) -> bool:
    """Whether a convolution or a linear layer of the part is left to prune."""
    left = set(operation_names(part)).difference(ignored.names if ignored else ())
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return any(isinstance(layer, kinds) for layer in layers_of(left, part.module))


def sparsity_target(entry: Section) -> float:
    """The sparsity at which the schedule of a 2.x section ends."""
    params = mapping(entry, "params")
    levels = params.get("multistep_sparsity_levels")
    target = params.get("sparsity_target", levels[-1] if levels else 0.5)
    target = number(entry, "params.sparsity_target", target)
    if not 0.0 < target < 1.0:
        raise SectionError(f"{entry}: the target sparsity must lie between 0 and 1; got {target}")
    return float(target)


def _filter_pruning(network: nn.Module, entry: Section, run: Run) -> tuple[nn.Module, str, dict[str, Any]]:
    dense = baked(network, run.example)
    before = sum(p.numel() for p in dense.parameters())
    scopes = run.scopes_of(entry)
    result, ratio = prune_filters(dense, entry, scopes, run.example)
    scopes.check(run.known)
    after = sum(p.numel() for p in result.parameters())
    text = f"Torch-Pruning removed {100 * ratio:.0f} % of the filters: {before:,} parameters became {after:,}"
    return result, text, {"before": before, "after": after, "ratio": ratio}


def baked(network: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """``network`` with masks and quantizers fixed in its weights and no hooks; itself if it has none."""
    return unwrapped_weights(network) if is_wrapped(network) else network


def _hooks(network: nn.Module) -> int:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    return sum(
        len({id(hook) for _, hook in get_hook_storage(module).named_hooks()})
        for _, module in wrapped_parts(network)
        if is_wrapped(module)
    )
