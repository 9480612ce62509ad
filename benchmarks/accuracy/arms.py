"""What is compared: networks made from one dense network, at equal active parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from sigmab_plugin import SigmaBConfig, SigmaBPruner, static_twin
from sigmab_plugin.channels import Slices
from sigmab_plugin.counting import parameter_count
from sigmab_plugin.data import Loader, Subset
from sigmab_plugin.modes import evaluating
from sigmab_plugin.tree.repair import Pair, fit_layers

from .experiments import Experiment
from .variants import build_variant


def tree_config(recipe: dict[str, Any], arm: dict[str, Any], seed: int) -> SigmaBConfig:
    """The tree of the recipe, with the arm's changes."""
    settings = dict(recipe["tree"])
    preset = settings.pop("preset")
    return SigmaBConfig.preset(preset, **{**settings, "seed": seed, **arm.get("config", {})})


def calibration(experiment: Experiment, recipe: dict[str, Any], seed: int, device: str = "cpu") -> Loader:
    """Training samples as they are, not augmented; the same for every arm of a seed."""
    settings = recipe["calibration"]
    order = torch.randperm(len(experiment.train), generator=torch.Generator().manual_seed(seed))
    part = Subset(experiment.train, order[: settings["samples"]].numpy())
    select = functools.partial(_selected, select=experiment.select, device=device)
    return Loader(part, batch_size=settings["batch_size"], augment=select)


def _selected(inputs: Any, generator: torch.Generator, *, select: Any, device: str) -> Any:
    return to_device(inputs if select is None else select(inputs, generator), device)


def to_device(inputs: Any, device: str) -> Any:
    """A tensor or a tuple of tensors on the device."""
    return tuple(part.to(device) for part in inputs) if isinstance(inputs, tuple) else inputs.to(device)


def build_arm(
    experiment: Experiment,
    recipe: dict[str, Any],
    arm: dict[str, Any],
    dense: nn.Module,
    *,
    seed: int,
    device: str = "cpu",
) -> nn.Module:
    """The arm's network before fine-tuning; ``dense`` is left as it is."""
    config = tree_config(recipe, arm, seed)
    dense = dense.to(device)
    example = to_device(experiment.example(2), device)
    data = calibration(experiment, recipe, seed, device)
    if arm["kind"] == "tree":
        pruner = SigmaBPruner(dense, example, calibration_data=data, config=config)
        net: nn.Module = (
            build_variant(arm["builder"], pruner.prepared, data) if "builder" in arm else pruner.step()
        )
    elif arm["kind"] == "twin":
        net = static_twin(dense, example, config=config, calibration_data=data)
    elif arm["kind"] == "wide_twin":
        target = active_parameters(dense, example, config, data)
        net = wide_twin(dense, example, config, target=target, data=data)
    elif arm["kind"] == "torch_pruning":
        target = active_parameters(dense, example, config, data)
        net = pruned(dense, example, arm["importance"], config=config, target=target, data=data)
    else:
        raise ValueError(f"unknown kind of arm: {arm['kind']!r}")
    return net.to(memory_format=experiment.memory_format)  # type: ignore[call-overload,no-any-return]


def active_parameters(dense: nn.Module, example: Any, config: SigmaBConfig, data: Loader) -> int:
    """Parameters on the tree's largest path. Widths do not depend on the data, so one batch is enough."""
    few = Loader(data.dataset, batch_size=data.batch_size, augment=data.augment)
    batch = [next(iter(few))]
    net = SigmaBPruner(
        dense, example, calibration_data=batch, config=config.replace(kmeans_restarts=1, repair="none")
    ).step()
    return int(net.parameter_counts().active)


def wide_twin(
    dense: nn.Module, example: Any, config: SigmaBConfig, *, target: int, data: Loader
) -> nn.Module:
    """A static twin that spends what the tree spends on routers on its own width instead.

    The twin of the same shape has no routers, so it is smaller than the tree's path. Here the widths
    of the tail's outputs are multiplied by the factor at which parameter counts agree best.
    """
    batch = [next(iter(data))]

    def twin(factor: float, calibration_data: Any, *, repair: str) -> nn.Module:
        if config.widths:
            changed = config.replace(widths=_scaled(config.widths, factor))
        else:
            changed = config.replace(active_ratio=min(1.0, factor * target / parameter_count(dense)))
        changed = changed.replace(repair=repair)
        return static_twin(dense, example, config=changed, calibration_data=calibration_data)

    factor = _solve(
        lambda f: parameter_count(twin(f, batch, repair="none")), target, low=0.9, high=1.6, rising=True
    )
    return twin(factor, data, repair=config.repair)


def _scaled(widths: Any, factor: float) -> Any:
    """Output widths times ``factor``; inner ones may be at the dense width already and stay."""
    if isinstance(widths, dict):
        return {key: value if key == "inner" else _scaled(value, factor) for key, value in widths.items()}
    return round(widths * factor)


def pruned(
    dense: nn.Module, example: Any, importance: str, *, config: SigmaBConfig, target: int, data: Loader
) -> nn.Module:
    """Torch-Pruning at the uniform ratio whose parameter count is nearest to ``target``.

    ``config`` says whether its layers are repaired as the tree's and the twin's are, on as many samples.
    """

    def count(ratio: float) -> int:
        return parameter_count(_prune(dense, example, "magnitude", ratio=ratio, data=data)[0])

    ratio = _solve(count, target, low=0.0, high=0.95, rising=False)  # the count depends on the ratio alone
    model, slices = _prune(dense, example, importance, ratio=ratio, data=data)
    if config.repair != "none":
        inputs = _first_samples(data, config.repair_samples)
        with evaluating(dense, model):
            fit_layers(dense, model, slices, Pair(inputs, inputs))
    return model


def _first_samples(data: Loader, count: int) -> Any:
    """Inputs of the first ``count`` samples as one batch; the data are in random order already."""
    part = Subset(data.dataset, np.arange(min(count, len(data.dataset))))
    few = Loader(part, batch_size=count, augment=data.augment)
    return next(iter(few))[0]


def _solve(count: Callable[[float], int], target: int, *, low: float, high: float, rising: bool) -> float:
    """Bisection for the argument whose count is nearest to ``target``; counts are step functions."""
    best, gap = low, abs(count(low) - target)
    for _ in range(9):
        middle = (low + high) / 2
        found = count(middle)
        if abs(found - target) < gap:
            best, gap = middle, abs(found - target)
        low, high = (middle, high) if (found < target) == rising else (low, middle)
    return best


def _prune(
    dense: nn.Module, example: Any, importance: str, *, ratio: float, data: Loader
) -> tuple[nn.Module, Slices]:
    """The pruned network, and what it keeps of each weight."""
    model = copy.deepcopy(dense)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    makers: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
    }
    swapped = _pyg_linears_as_torch(model)
    pruner = tp.pruner.BasePruner(
        model, example, importance=makers[importance](), pruning_ratio=ratio, ignored_layers=[head]
    )
    if importance == "taylor":
        _backward(model, data)
    names = {module: name for name, module in _layers(model)}
    kept = {
        (name, dim): torch.ones(layer.weight.shape[dim], dtype=torch.bool)
        for name, layer in _layers(model)
        for dim in (0, 1)
    }
    for group in pruner.step(interactive=True):
        before = {key: mask.clone() for key, mask in kept.items()}
        for dependency, lost in group:
            name = names.get(dependency.target.module)
            if name is not None:
                dim = int(pruner.DG.is_in_channel_pruning_fn(dependency.handler))
                if not bool(before[name, dim].all()):
                    raise NotImplementedError(
                        f"{name}: two groups cut dimension {dim}, whose indices have moved"
                    )
                kept[name, dim][list(lost)] = False
        group.prune()
    slices: Slices = {}
    for (name, dim), mask in kept.items():
        if not bool(mask.all()):
            slices.setdefault(f"{name}.weight", {})[dim] = mask.nonzero().flatten()
    model.zero_grad(set_to_none=True)
    for module, kind in swapped:
        module.__class__ = kind
    return model, slices


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Linear layers and convolutions."""
    return [
        (name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    ]


def _pyg_linears_as_torch(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Let Torch-Pruning see torch-geometric's Linear, which is no ``nn.Linear``; without it nothing is pruned."""
    swapped = []
    for module in model.modules():
        kind = type(module)
        if kind.__module__ == "torch_geometric.nn.dense.linear" and kind.__name__ == "Linear":
            module.__class__ = type("PrunableLinear", (kind, nn.Linear), {**_alias("in"), **_alias("out")})
            swapped.append((module, kind))
    return swapped


def _alias(side: str) -> dict[str, property]:
    """``nn.Linear``'s name for what torch-geometric calls channels."""

    def get(module: Any) -> int:
        return int(getattr(module, f"{side}_channels"))

    def put(module: Any, value: int) -> None:
        setattr(module, f"{side}_channels", value)

    return {f"{side}_features": property(get, put)}


def _backward(model: nn.Module, data: Loader, *, batches: int = 8) -> None:
    """Gradients of the loss over a few batches, for Taylor importance."""
    model.eval()
    for number, (inputs, labels) in enumerate(data):
        if number == batches:
            break
        logits = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        F.cross_entropy(logits, labels.to(logits.device)).backward()
