"""What the sections of a config file say to NNCF's functions and to Torch-Pruning: keyword arguments."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .nncf_schema import Section, SectionError
from .nncf_v3_parts import Part, wrapped_parts
from .nncf_v3_scopes import SectionScopes, layers_of

_log = logging.getLogger(__name__)

# ---------------------------------------------------------------- arguments


Arguments = Callable[[Part], dict[str, Any]]


#: Keys of a 2.x section that nncf.quantize has no counterpart of.
_UNUSED = ("scope_overrides", "target_scopes", "quantize_outputs", "compression_lr_multiplier")
#: Those of ``weights`` and ``activations``; bits, mode and per_channel are read.
_UNUSED_OF_A_SIDE = (
    "ignored_scopes", "target_scopes", "signed", "level_low", "level_high", "logarithm_scale", "adjust_padding",
    "unified_scale_ops",
)  # fmt: skip


def mapping(entry: Section, key: str) -> Mapping[str, Any]:
    """The object that a section has under ``key``; an empty one if it has none."""
    value = entry.values.get(key, {})
    if not isinstance(value, Mapping):
        raise SectionError(f"{entry}: {key} must be an object; got {value!r}")
    return value


def number(entry: Section, key: str, value: Any) -> float:
    """``value`` as a number, which the section has under ``key``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SectionError(f"{entry}: {key} must be a number; got {value!r}")
    return value


def choice(entry: Section, key: str, value: Any, kind: Any) -> Any:
    """The member of the enumeration ``kind`` with this value."""
    values = [member.value for member in kind]
    if value not in values:
        raise SectionError(f"{entry}: {key} must be one of {', '.join(map(repr, values))}; got {value!r}")
    return kind(value)


def device_of(target_device: str) -> Any:
    """``nncf.TargetDevice`` of the file's ``target_device``."""
    import nncf

    names = {device.name: device for device in nncf.TargetDevice}
    names |= {"TRIAL": nncf.TargetDevice.ANY, "VPU": nncf.TargetDevice.NPU}
    if target_device not in names:
        raise SectionError(f"target_device must be one of {', '.join(names)}; got {target_device!r}")
    return names[target_device]


def warn_unused(entry: Section) -> None:
    """One line that names the keys of a ``quantization`` section that are without effect."""
    values = entry.values
    unused = [key for key in _UNUSED if key in values]
    unused += [key for key in ("quantize_inputs", "export_to_onnx_standard_ops") if values.get(key) is False]
    for side in ("weights", "activations"):
        unused += [f"{side}.{key}" for key in _UNUSED_OF_A_SIDE if key in mapping(entry, side)]
    if unused:
        _log.warning("%s: %s: no counterpart in nncf.quantize, without effect", entry, ", ".join(unused))


def quantization_arguments(
    entry: Section, scopes: SectionScopes, target_device: str
) -> tuple[Arguments, int]:
    """Keyword arguments of ``nncf.quantize`` for a part, and the number of calibration samples."""
    import nncf

    values = entry.values
    presets = {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}
    preset = values.get("preset", "performance")
    if preset not in presets:
        raise SectionError(f"{entry}: preset must be 'performance' or 'mixed'; got {preset!r}")
    device = device_of(target_device)
    initial = mapping(entry, "initializer").get("range", {})
    initial = initial[0] if isinstance(initial, list) and initial else initial
    samples = values.get("subset_size", (initial or {}).get("num_init_samples", 300))
    samples = int(number(entry, "the number of calibration samples", samples))
    if samples < 1:
        raise SectionError(f"{entry}: the number of calibration samples must be positive")
    given: dict[str, Any] = {"preset": presets[preset], "target_device": device}
    if values.get("model_type") is not None:
        given["model_type"] = choice(entry, "model_type", values["model_type"], nncf.ModelType)
    advanced = {
        f"{side}_quantization_params": side_parameters
        for side in ("weights", "activations")
        if (side_parameters := _side_parameters(entry, side)) is not None
    }
    if "overflow_fix" in values:
        advanced["overflow_fix"] = choice(entry, "overflow_fix", values["overflow_fix"], nncf.OverflowFix)
    if advanced:
        given["advanced_parameters"] = nncf.AdvancedQuantizationParameters(**advanced)

    def arguments(part: Part) -> dict[str, Any]:
        return {**given, "ignored_scope": scopes.ignored_scope(part)}

    return arguments, samples


def _side_parameters(entry: Section, side: str) -> Any:
    """``mode`` and ``per_channel`` of ``weights`` or ``activations``; None where NNCF is to choose."""
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization.advanced_parameters import QuantizationParameters

    values = mapping(entry, side)
    bits = values.get("bits", 8)
    if bits != 8:
        raise SectionError(f"{entry}: {side}.bits = {bits}; nncf.quantize knows 8 bits only")
    given: dict[str, Any] = {}
    if "mode" in values:
        given["mode"] = choice(entry, f"{side}.mode", values["mode"], QuantizationScheme)
    if "per_channel" in values:
        given["per_channel"] = bool(values["per_channel"])
    return QuantizationParameters(**given) if given else None


def weight_compression_arguments(entry: Section, scopes: SectionScopes) -> Arguments:
    """Keyword arguments of ``nncf.compress_weights`` for a part."""
    import nncf

    values = entry.values
    modes = {mode.value: mode for mode in nncf.CompressWeightsMode}
    mode = values.get("mode", "int8_asym")
    if mode not in modes:
        raise SectionError(f"{entry}: mode must be one of {', '.join(modes)}; got {mode!r}")
    plain = ("ratio", "group_size", "all_layers", "awq", "scale_estimation", "gptq", "lora_correction")
    given: dict[str, Any] = {"mode": modes[mode], **{key: values[key] for key in plain if key in values}}
    for key, kind in (("sensitivity_metric", nncf.SensitivityMetric), ("backup_mode", nncf.BackupMode)):
        if key in values:
            given[key] = choice(entry, key, values[key], kind)

    def arguments(part: Part) -> dict[str, Any]:
        return {**given, "ignored_scope": scopes.ignored_scope(part)}

    return arguments


def part_ratios(network: nn.Module, ratio: float) -> dict[str, float]:
    """Share of each part's weights that one threshold masks, which masks ``ratio`` of the whole network's.

    Routers are left out of both.
    """
    found = {
        name: _prunable(module) for name, module in wrapped_parts(network) if not name.startswith("routers.")
    }
    weights = {name: torch.cat(tensors) for name, tensors in found.items() if tensors}
    everything = torch.cat(list(weights.values()))
    threshold = everything.kthvalue(max(1, int(ratio * everything.numel()))).values
    return {name: float((values <= threshold).float().mean()) for name, values in weights.items()}


def _prunable(module: nn.Module) -> list[torch.Tensor]:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [m.weight.detach().abs().flatten() for m in module.modules() if isinstance(m, kinds)]


def pruning_arguments(entry: Section) -> tuple[float, Any]:
    """Share of filters to remove, and Torch-Pruning's importance, of a ``filter_pruning`` section."""
    import torch_pruning as tp

    params = mapping(entry, "params")
    if "pruning_flops_target" in params:
        raise SectionError(
            f"{entry}: params.pruning_flops_target has no counterpart here; use params.pruning_target"
        )
    ratio = number(entry, "params.pruning_target", params.get("pruning_target", 0.5))
    if not 0.0 < ratio < 1.0:
        raise SectionError(f"{entry}: params.pruning_target must lie between 0 and 1; got {ratio}")
    importances: Mapping[str, Callable[[], Any]] = {
        "L2": lambda: tp.importance.MagnitudeImportance(p=2),
        "L1": lambda: tp.importance.MagnitudeImportance(p=1),
        "geometric_median": lambda: tp.importance.FPGMImportance(),
    }
    kind = params.get("filter_importance", "L2")
    if kind not in importances:
        raise SectionError(
            f"{entry}: params.filter_importance must be one of {', '.join(importances)}; got {kind!r}"
        )
    return ratio, importances[kind]()


def prune_filters(
    model: nn.Module, entry: Section, scopes: SectionScopes, example: tuple[Any, ...]
) -> tuple[nn.Module, float]:
    """``filter_pruning`` by Torch-Pruning: a smaller copy of ``model``, and the share of filters removed."""
    import torch_pruning as tp

    params = entry.values.get("params", {})
    ratio, importance = pruning_arguments(entry)
    result = copy.deepcopy(model)
    part = Part("", result, [example], [1])
    ignored = layers_of(scopes.left_out(part), result)
    linear = [m for m in result.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in result.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    if convolutions and not params.get("prune_first_conv", False):
        ignored.append(convolutions[0])
    flags = {name: p.requires_grad for name, p in result.named_parameters()}
    for parameter in result.parameters():
        parameter.requires_grad_(True)
    base: Any = getattr(tp.pruner, "BasePruner", None) or tp.pruner.MetaPruner
    pruner = base(
        result,
        example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=bool(params.get("all_weights", False)),
        ignored_layers=[*ignored, *(linear if convolutions else linear[-1:])],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(flags[name])
    return result.eval(), ratio
