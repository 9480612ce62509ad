"""What the sections of a config file say to NNCF's functions and to Torch-Pruning: scopes and keyword arguments."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .nncf_schema import Section, SectionError, module_path
from .nncf_v3_parts import Part, is_wrapped, wrapped_parts

_log = logging.getLogger(__name__)

# ---------------------------------------------------------------- scopes


def ignored_scope(part: Part, entry: Section, scopes: Sequence[str]) -> Any:
    """``nncf.IgnoredScope`` for one part: those scopes of the file that name something in it.

    2.x scopes (``"ResNet/Sequential[layer3]/NNCFConv2d[0]/conv2d_0"``) and 3.x names (``"layer3/0/conv2d/0"``) both
    work; layers keep their qualified names inside a part.
    """
    import nncf

    own = entry.values.get("ignored_scopes") or []
    patterns = [_pattern(scope) for scope in (*scopes, *([own] if isinstance(own, str) else own))]
    present = _operation_names(part)
    matching = sorted({name for name in present for pattern in patterns if re.search(pattern, name)})
    return nncf.IgnoredScope(names=matching, validate=False) if matching else None


def _pattern(scope: str) -> str:
    """A regular expression over 3.x operation names."""
    if scope.startswith("{re}"):
        text = scope[len("{re}") :]
        # 2.x scopes name the class of every module: Sequential[layer3] -> layer3
        return re.sub(r"\w*\\?\[([\w.]+)\\?\]", r"\1", re.sub(r"^\^?\w+/(?=\w+\\?\[)", "(^|/)", text))
    path = module_path(scope).replace(".", "/") if "[" in scope else scope
    return f"(^|/){re.escape(path)}(/|$)"


def _operation_names(part: Part) -> list[str]:
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
    from nncf.torch.function_hook.wrapper import wrap_model

    example = part.example if isinstance(part.example, tuple) else (part.example,)
    module = part.module if is_wrapped(part.module) else wrap_model(copy.deepcopy(part.module))
    return [node.node_name for node in build_nncf_graph(module, example).get_all_nodes()]


# ---------------------------------------------------------------- arguments


Arguments = Callable[[Part], dict[str, Any]]


def quantization_arguments(
    entry: Section, scopes: Sequence[str], target_device: str
) -> tuple[Arguments, int]:
    """Keyword arguments of ``nncf.quantize`` for a part, and the number of calibration samples."""
    import nncf

    values = entry.values
    presets = {"performance": nncf.QuantizationPreset.PERFORMANCE, "mixed": nncf.QuantizationPreset.MIXED}
    preset = values.get("preset", "performance")
    if preset not in presets:
        raise SectionError(f"{entry}: preset must be 'performance' or 'mixed'; got {preset!r}")
    for side in ("weights", "activations"):
        bits = values.get(side, {}).get("bits", 8)
        if bits != 8:
            raise SectionError(f"{entry}: {side}.bits = {bits}; nncf.quantize knows 8 bits only")
    unused = [
        k
        for k in ("scope_overrides", "target_scopes", "quantize_outputs", "compression_lr_multiplier")
        if k in values
    ]
    if unused:
        _log.warning("%s: %s: no counterpart in nncf.quantize, without effect", entry, ", ".join(unused))
    devices = {"TRIAL": "ANY", "VPU": "NPU"}
    device = nncf.TargetDevice[devices.get(target_device, target_device)]
    initial = values.get("initializer", {}).get("range", {})
    initial = initial[0] if isinstance(initial, list) and initial else initial
    samples = int(values.get("subset_size", (initial or {}).get("num_init_samples", 300)))
    if samples < 1:
        raise SectionError(f"{entry}: the number of calibration samples must be positive")

    def arguments(part: Part) -> dict[str, Any]:
        given: dict[str, Any] = {
            "preset": presets[preset],
            "target_device": device,
            "ignored_scope": ignored_scope(part, entry, scopes)
            if scopes or values.get("ignored_scopes")
            else None,
        }
        if values.get("model_type") == "transformer":
            given["model_type"] = nncf.ModelType.TRANSFORMER
        if "overflow_fix" in values:
            fix = nncf.OverflowFix(values["overflow_fix"])
            given["advanced_parameters"] = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
        return given

    return arguments, samples


def weight_compression_arguments(entry: Section, scopes: Sequence[str]) -> Arguments:
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
            given[key] = kind(values[key])

    def arguments(part: Part) -> dict[str, Any]:
        listed = scopes or values.get("ignored_scopes")
        return {**given, "ignored_scope": ignored_scope(part, entry, scopes) if listed else None}

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

    params = entry.values.get("params", {})
    if "pruning_flops_target" in params:
        raise SectionError(
            f"{entry}: params.pruning_flops_target has no counterpart here; use params.pruning_target"
        )
    ratio = float(params.get("pruning_target", 0.5))
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
    model: nn.Module, entry: Section, scopes: Sequence[str], example: tuple[Any, ...]
) -> tuple[nn.Module, float]:
    """``filter_pruning`` by Torch-Pruning: a smaller copy of ``model``, and the share of filters removed."""
    import torch_pruning as tp

    params = entry.values.get("params", {})
    ratio, importance = pruning_arguments(entry)
    result = copy.deepcopy(model)
    own = entry.values.get("ignored_scopes") or []
    patterns = [_pattern(scope) for scope in (*scopes, *([own] if isinstance(own, str) else own))]
    layers = dict(result.named_modules())
    ignored = [m for n, m in layers.items() if any(re.search(p, n.replace(".", "/") + "/") for p in patterns)]
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
