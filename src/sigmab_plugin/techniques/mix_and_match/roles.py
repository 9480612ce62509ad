"""What each weight is for: found from module types and from the place in the graph."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ...counting import as_arguments
from ...errors import ConfigError, ModelError
from ..supervised import differentiable_copy, logits_of
from .config import MixAndMatchConfig

logger = logging.getLogger(__name__)

_NORMALIZATION = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class LayerWeight:
    """One weight tensor of a layer.

    Attributes:
        name: its parameter name, ``"layer1.0.conv1.weight"``.
        module: the layer's name.
        role: one of :data:`~sigmab_plugin.techniques.mix_and_match.config.ROLES`.
        parameters: number of weights.
    """

    name: str
    module: str
    role: str
    parameters: int


def find_layers(
    model: nn.Module, example_inputs: Any, config: MixAndMatchConfig | None = None
) -> tuple[LayerWeight, ...]:
    """Every weight tensor of ``model``'s layers with its role, in order of definition.

    A layer is a module without children, or attention with its own projection. What is no layer's
    weight (biases, class tokens, position tables) is left out. Roles:

    - *normalization*: by type, or by a class name that ends in "Norm";
    - *patch_embedding*: within a module of a "PatchEmbed..." class, or the convolution that reads the
      input image with a stride as large as its kernel;
    - *embedding*: ``nn.Embedding``;
    - *attention*: ``nn.MultiheadAttention``, or within a module whose class name has "Attention" or "Attn";
    - *router*: within a module whose class name has "Router";
    - *classifier*: the layers whose outputs are the logits, and linear layers that feed nothing but them
      (VGG's three); a whole network of linear layers keeps its last as classifier;
    - *feature*: the rest.

    ``config.roles`` overrides by pattern. Runs a copy of ``model`` once; ``model`` is only read.

    Raises:
        ModelError: nothing to prune, or parameters without a shape.
        ConfigError: a pattern that matches no layer.
    """
    config = config or MixAndMatchConfig()
    modules = _layers(model)
    consumed = _trace(model, example_inputs, modules)
    roles = {name: _role_by_type(model, name, module) for name, module in modules.items()}
    first = consumed.order[0] if consumed.order else None
    if first is not None and roles[first] == "feature" and _is_patchify(modules[first]):
        roles[first] = "patch_embedding"
    for name in _classifiers(modules, roles, consumed):
        roles[name] = "classifier"
    for pattern, role in config.roles.items():
        for name in _matching(modules, pattern, "roles"):
            roles[name] = role
    owners = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    ignored = {
        name for pattern in config.ignored_layers for name in _matching(owners, pattern, "ignored_layers")
    }
    found: list[LayerWeight] = []
    # A weight that an ignored layer shares stays dense in every layer.
    seen = {id(parameter) for name in ignored for parameter in owners[name].parameters()}
    for name, module in modules.items():
        if name in ignored:
            continue
        for tensor, parameter in module.named_parameters(recurse=False):
            wanted = parameter.ndim >= 2 or roles[name] == "normalization"
            if wanted and "weight" in tensor and parameter.is_floating_point() and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(
                    LayerWeight(f"{name}.{tensor}".lstrip("."), name, roles[name], parameter.numel())
                )
    if all(layer.role == "normalization" for layer in found):
        parametrized = any(parametrize.is_parametrized(module) for module in model.modules())
        raise ModelError(
            f"{type(model).__name__} has no layer weights to prune"
            + (
                "; remove the parametrizations of its layers first (remove_parametrizations)"
                if parametrized
                else ""
            )
        )
    return tuple(found)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    layers = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        if any(is_lazy(parameter) for parameter in parameters):
            raise ModelError(f"layer {name!r} has no shape yet; run the model once, then prune it")
        leaf = not any(True for _ in module.children())
        if parameters and (leaf or isinstance(module, nn.MultiheadAttention) or _is_normalization(module)):
            layers[name] = module
    return layers


def skipped_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What has weights of two dimensions or more and is no layer: parametrized modules, and those with children."""
    layers = _layers(model)
    taken = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
    skipped = {}
    for name, module in model.named_modules():
        if name in layers or "parametrizations" in name.split("."):
            continue
        own = [parameter for key, parameter in module.named_parameters(recurse=False) if "weight" in key]
        if parametrize.is_parametrized(module):
            own += module.parametrizations.parameters()  # type: ignore[operator, union-attr]
        if any(p.ndim >= 2 and p.is_floating_point() and id(p) not in taken for p in own):
            skipped[name] = module
    return skipped


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern is that of the module or of one around it."""
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        for pattern in patterns
    )


def _matching(modules: Mapping[str, nn.Module], pattern: str, key: str) -> list[str]:
    names = [name for name in modules if matches(name, (pattern,))]
    if not names:
        raise ConfigError(f"mix_and_match: {key}: {pattern!r} matches no layer of the model")
    return names


def _is_normalization(module: nn.Module) -> bool:
    return isinstance(module, _NORMALIZATION) or type(module).__name__.endswith("Norm")


def _ancestors(model: nn.Module, name: str) -> Iterable[str]:
    """Class names of the module and of those around it, the model's own excluded."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        yield type(model.get_submodule(".".join(parts[:end]))).__name__


def _role_by_type(model: nn.Module, name: str, module: nn.Module) -> str:
    if _is_normalization(module):
        return "normalization"
    classes = list(_ancestors(model, name)) if name else [type(model).__name__]
    if any("PatchEmbed" in kind for kind in classes):
        return "patch_embedding"
    if any("Router" in kind for kind in classes):
        return "router"
    if isinstance(module, nn.MultiheadAttention) or any("Attention" in k or "Attn" in k for k in classes):
        return "attention"
    return "embedding" if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else "feature"


def _is_patchify(module: nn.Module) -> bool:
    return (
        isinstance(module, _ConvNd)
        and not module.transposed
        and tuple(module.kernel_size) == tuple(module.stride)
        and max(module.stride) > 1
    )


@dataclass(frozen=True)
class _Trace:
    """Order of execution; layers nearest to the logits; per layer those nearest upstream; logits' width."""

    order: list[str]
    last: set[str]
    upstream: dict[str, set[str]]
    classes: int


def _trace(model: nn.Module, example_inputs: Any, modules: Mapping[str, nn.Module]) -> _Trace:
    working = differentiable_copy(model)
    for parameter in working.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    nodes: dict[Any, str] = {}
    order: list[str] = []

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            order.append(name)
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                nodes[tensor.grad_fn] = name

        return hook

    for name in modules:
        working.get_submodule(name).register_forward_hook(record(name))
    with torch.enable_grad():
        logits = logits_of(working(*as_arguments(example_inputs)))
    if logits.grad_fn is None:
        logger.warning("mix_and_match: the output has no gradient, so the classifier is not found; set roles")
        return _Trace(order, set(), {}, 0)
    upstream: dict[str, set[str]] = {}
    for node, name in nodes.items():
        upstream.setdefault(name, set()).update(_nearest(node, nodes))
    at_logits = nodes.get(logits.grad_fn)
    last = {at_logits} if at_logits is not None else _nearest(logits.grad_fn, nodes)
    return _Trace(order, last, upstream, class_count(logits))


def class_count(logits: Tensor) -> int:
    """Classes of ``(B, ..., classes)`` logits; of maps ``(B, classes, H, W)`` and volumes the second dimension."""
    return logits.shape[1] if logits.ndim >= 4 else logits.shape[-1]


def _nearest(start: Any, nodes: Mapping[Any, str]) -> set[str]:
    """Names of the recorded nodes that are reached first when walking back from ``start``."""
    found, seen, stack = set(), {start}, [node for node, _ in start.next_functions]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in nodes:
            found.add(nodes[node])
        else:
            stack.extend(following for following, _ in node.next_functions)
    return found


def _classifiers(modules: Mapping[str, nn.Module], roles: Mapping[str, str], trace: _Trace) -> set[str]:
    def gives_logits(name: str) -> bool:
        module = modules[name]
        return roles[name] == "feature" and trace.classes in (
            getattr(module, "out_features", None),
            getattr(module, "out_channels", None),
        )

    seeds = {name for name in trace.last if gives_logits(name)}
    consumers: dict[str, set[str]] = {}
    for name, sources in trace.upstream.items():
        for source in sources:
            consumers.setdefault(source, set()).add(name)

    def feeds_only(name: str, chosen: set[str]) -> bool:
        """All of its consumers are in ``chosen``; BatchNorm between linear layers is looked through."""
        following = consumers.get(name, set())
        return bool(following) and all(
            other in chosen or (isinstance(modules[other], _BatchNorm) and feeds_only(other, chosen))
            for other in following
        )

    chosen = set(seeds)
    grew = bool(seeds)
    while grew:
        more = {
            name
            for name, module in modules.items()
            if name not in chosen
            and isinstance(module, nn.Linear)
            and roles[name] == "feature"
            and name not in trace.last
            and feeds_only(name, chosen)
        }
        chosen |= more
        grew = bool(more)
    features = [n for n, role in roles.items() if role != "normalization" and n not in chosen]
    return chosen if features else seeds
