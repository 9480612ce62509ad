"""The parts of a network that NNCF's functions treat one by one, and the arguments of these functions."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import CalibrationError
from ..tree.net import SigmaBNet
from ..tree.plan import child, module_key, prefixes
from ..tree.segments import call
from .nncf_schema import Section, SectionError, module_path

_log = logging.getLogger(__name__)

#: Samples that are carried through the tree; a leaf of four then sees some hundreds.
_LIMIT = 2048


@dataclass
class Part:
    """One module, the inputs that reach it, and where it stands."""

    name: str
    module: nn.Module
    inputs: list[Any]
    sizes: list[int]
    owner: nn.Module | None = None
    key: str = ""
    batch_axis: bool = True

    @property
    def example(self) -> Any:
        return self.inputs[0]

    @property
    def is_router(self) -> bool:
        return self.name.startswith("routers.")

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def batches(self, samples: int) -> Source:
        """The first batches that hold ``samples`` samples."""
        count, used = 0, []
        for value, size in zip(self.inputs, self.sizes, strict=True):
            if count >= samples:
                break
            used.append(value)
            count += size
        return Source(used, max(self.sizes) if self.batch_axis else 1)

    def replace(self, module: nn.Module) -> None:
        """Put ``module`` in the part's place; a part without an owner is the whole network."""
        if isinstance(self.owner, nn.ModuleDict):
            self.owner[self.key] = module
        elif self.owner is not None:
            setattr(self.owner, self.key, module)
        self.module = module


class Source(list):  # type: ignore[type-arg]
    """Batches, with the batch size that tells NNCF to keep statistics per sample."""

    def __init__(self, values: Iterable[Any], batch_size: int) -> None:
        super().__init__(values)
        self.batch_size = batch_size


# ---------------------------------------------------------------- wrapping


def is_wrapped(module: nn.Module) -> bool:
    from nncf.torch.function_hook import is_wrapped as nncf_is_wrapped

    return bool(nncf_is_wrapped(module))


def wrapped_parts(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every part; one part named ``""`` for a network that is no SigmaB net."""
    if not isinstance(network, SigmaBNet):
        return [("", network)]
    found: list[tuple[str, nn.Module]] = [("backbone", network.backbone)]
    for kind in ("routers", "specializers", "heads"):
        found += [(f"{kind}.{key}", module) for key, module in getattr(network, kind).items()]
    return found


def wrap_parts(network: nn.Module, *, copy_network: bool = True) -> nn.Module:
    """A copy of ``network`` whose parts are plain modules.

    NNCF takes an ``fx.GraphModule`` for the output of ``torch.export`` and refuses it; the segments of a SigmaB net
    are GraphModules that were cut, not exported.
    """
    result = copy.deepcopy(network) if copy_network else network
    for _, module in wrapped_parts(result):
        if isinstance(module, fx.GraphModule):
            module.__class__ = type("Segment", (nn.Module,), {"forward": type(module).forward})
    return result


def unwrapped_weights(network: nn.Module) -> nn.Module:
    """A copy of a network under ``nncf.prune``, masks multiplied into the weights, hooks removed."""
    import nncf
    from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE

    result: nn.Module = nncf.strip(network, do_copy=True, strip_format=nncf.StripFormat.IN_PLACE)
    result._modules.pop(ATR_HOOK_STORAGE, None)
    for name in ("forward", "_replicate_for_data_parallel"):
        result.__dict__.pop(name, None)
    return result


# ---------------------------------------------------------------- order of execution


def parts(network: nn.Module, data: Iterable[Any], *, per_leaf: bool) -> Iterator[Part]:
    """Every part in order of execution, with the inputs that reach it; change it before the next is asked for.

    Inputs are computed by the parts before, as changed: a leaf sees what the compressed backbone gives it, and (with
    ``per_leaf``) those samples that the compressed routers send it.
    """
    items = [tuple(item) if isinstance(item, (tuple, list)) else (item,) for item in data]
    if not items:
        raise CalibrationError("the calibration dataset is empty")
    if not isinstance(network, SigmaBNet):
        yield Part("", network, [_plain(item) for item in items], [_samples(item) for item in items])
        return
    yield from _tree_parts(network, items, per_leaf)


def change_parts(
    network: nn.Module, data: Iterable[Any], change: Callable[[Part], nn.Module], *, per_leaf: bool
) -> tuple[nn.Module, dict[str, int]]:
    """Replace every part by ``change(part)``, in order of execution.

    Returns:
        The network, which is ``change``'s result itself where it is one part; and the samples each part has seen.
    """
    seen = {}
    for part in parts(network, data, per_leaf=per_leaf):
        part.replace(change(part))
        seen[part.name] = part.samples
        if part.owner is None:
            network = part.module
    return network, seen


def _plain(item: tuple[Any, ...]) -> Any:
    return item[0] if len(item) == 1 else item


def _samples(item: Any) -> int:
    """Samples of a batch of inputs; for points with the cloud of each, clouds."""
    first, *others = item if isinstance(item, (tuple, list)) else (item,)
    if others and torch.is_tensor(others[-1]) and others[-1].ndim == 1 and not others[-1].is_floating_point():
        return int(others[-1].max()) + 1
    return int(first.shape[0]) if torch.is_tensor(first) and first.ndim else 1


def _tree_parts(net: SigmaBNet, items: list[tuple[Any, ...]], per_leaf: bool) -> Iterator[Part]:
    first = net.modality
    sizes = [_samples(item) for item in items]
    inputs = [_plain(item) for item in items]
    yield Part("backbone", net.backbone, inputs, sizes, net, "backbone", first.name != "points")
    yield from _below(net, "", _outputs(net.backbone, items, first), per_leaf)


def _below(net: SigmaBNet, path: str, frontiers: list[Any], per_leaf: bool) -> Iterator[Part]:
    depth = len(prefixes(path))
    kind = net.modalities[depth]
    axis = kind.name != "points"
    key = module_key(path)
    sizes = [kind.size(value) for value in frontiers]
    if path in net.leaves:
        inputs = [_plain(_tuple(value)) for value in frontiers]
        yield Part(f"heads.{key}", net.heads[key], inputs, sizes, net.heads, key, axis)
        return
    pooled = [kind.pool(value) for value in frontiers]
    yield Part(f"routers.{key}", net.routers[key], pooled, sizes, net.routers, key)
    with torch.no_grad():
        choices = [net.routers[key](value).argmax(dim=1) for value in pooled]
    for branch in (0, 1):
        below = child(path, branch)
        own = _branch(kind, frontiers, choices, branch) if per_leaf else frontiers
        if not own:
            _log.warning(
                "no calibration sample reaches branch %s; it is calibrated with those of its parent", below
            )
            own = frontiers
        inner = module_key(below)
        inputs = [_plain(_tuple(value)) for value in own]
        counts = [kind.size(value) for value in own]
        yield Part(
            f"specializers.{inner}", net.specializers[inner], inputs, counts, net.specializers, inner, axis
        )
        yield from _below(
            net, below, _outputs(net.specializers[inner], own, net.modalities[depth + 1]), per_leaf
        )


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _branch(kind: Any, frontiers: Sequence[Any], choices: Sequence[torch.Tensor], branch: int) -> list[Any]:
    chosen = []
    for value, choice in zip(frontiers, choices, strict=True):
        index = (choice == branch).nonzero().flatten()
        if len(index):
            chosen.append(kind.take(value, index))
    return chosen


def _outputs(module: nn.Module, values: Sequence[Any], kind: Any) -> list[Any]:
    """What the next parts read; ``kind`` is the modality of the results."""
    results: list[Any] = []
    count = 0
    with torch.no_grad():
        for value in values:
            if count >= _LIMIT:
                break
            results.append(call(module, value))
            count += kind.size(results[-1])
    return results


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
