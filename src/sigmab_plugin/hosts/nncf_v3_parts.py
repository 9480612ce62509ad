"""The parts of a network that NNCF's functions treat one by one, and the arguments of these functions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import CalibrationError
from ..tree.net import SigmaBNet
from ..tree.plan import child, module_key, prefixes
from ..tree.segments import call

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


# ---------------------------------------------------------------- inputs


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
