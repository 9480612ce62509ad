"""BatchNorm statistics re-estimated from data: in a tree, every leaf's from the samples that reach it.

Soft-routing training feeds every sample to every leaf, so a leaf's running statistics describe the whole
data set; deployed, the leaf sees its own share alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..counting import as_arguments
from ..errors import TrainingError
from .batches import inputs_of, sample_count, to_device
from .distributed import all_reduce_sum, rank
from .evaluation import hard_routing, module_device
from .objective import is_tree
from .seeding import loader_left_as_found, preserve_random_state, seed_epoch

logger = logging.getLogger(__name__)


def reestimate_batchnorm(
    net: nn.Module,
    loader: Iterable[Any],
    *,
    per_leaf: bool = True,
    example_inputs: Any = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> None:
    """Replace the running means and variances of ``net`` by those of the data; nothing else changes.

    Batches are normalised by their own statistics on the way (as in training), dropout is off, and the
    statistics are those of all values together, not averages over batches. A tree with ``per_leaf`` is done
    from the root outwards, one pass for the backbone, one per level and one for the heads where these hold
    BatchNorm: each pass routes with what the earlier ones found, in hard routing. A branch that no sample
    reaches keeps its statistics, with a warning. Ranks of a process group share their sums.

    Args:
        net: a tree or any module.
        loader: re-iterable of inputs or (inputs, targets), whose targets are not used; read once per pass.
        per_leaf: False: every sample counts for every leaf of a tree, in one pass.
        example_inputs: one batch of inputs; needed only where the net takes two inputs and ``loader`` gives no
            targets, to tell the two inputs from (inputs, targets).
        device: where ``net`` is; by default the device of its first parameter.
        seed: fixes the order and augmentation of the data.

    Raises:
        TrainingError: empty loader.
    """
    place = torch.device(device) if device is not None else module_device(net)
    with hard_routing(net), torch.no_grad(), preserve_random_state(), loader_left_as_found(loader):
        if is_tree(net) and per_leaf:
            walk = _TreeWalk(net)
            for stage in walk.stages():
                with _Collection(stage) as collection:
                    for inputs in _inputs(loader, example_inputs, place, seed):
                        walk.run(inputs, collection)
                    collection.flush()
        else:
            forward = net.forward_leaves if is_tree(net) else net
            with _Collection({"": net}) as collection, collection.collecting(""):
                for inputs in _inputs(loader, example_inputs, place, seed):
                    forward(*as_arguments(inputs))  # type: ignore[operator]


def _inputs(loader: Iterable[Any], example: Any, device: torch.device, seed: int) -> Iterator[Any]:
    """Inputs of all batches; one of a single sample is left out, its variance being none."""
    seed_epoch(loader, seed=seed, epoch=0, rank=rank())
    used = 0
    for batch in loader:
        inputs = inputs_of(batch, example_inputs=example)
        samples = sample_count(inputs) if inputs is batch else len(batch[1])
        if samples > 1:
            used += 1
            yield to_device(inputs, device)
    if not used:
        raise TrainingError("BatchNorm re-estimation needs at least one batch of two samples or more")


class _Collection:
    """Sums of every BatchNorm's inputs, for the modules of one stage; writes the buffers at the end."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._norms = {path: _norms(module) for path, module in modules.items()}
        self._sums: dict[_BatchNorm, Tensor] = {}
        self._pending: dict[str, list[Any]] = {path: [] for path in modules}
        self._waiting = dict.fromkeys(modules, 0)
        self._seen = dict.fromkeys(modules, 0)
        self._kinds: dict[str, Any] = {}

    def __enter__(self) -> _Collection:
        for norms in self._norms.values():
            for norm in norms:
                assert norm.running_mean is not None
                self._sums[norm] = torch.zeros(
                    3, norm.num_features, dtype=torch.float64, device=norm.running_mean.device
                )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._write()

    @contextmanager
    def collecting(self, path: str) -> Iterator[None]:
        """BatchNorms of module ``path`` normalise by the batch and add their inputs to the sums."""
        with ExitStack() as hooks:
            for norm in self._norms[path]:
                norm.training, norm.track_running_stats = True, False
                handle = norm.register_forward_pre_hook(self._add)
                hooks.callback(handle.remove)
            try:
                yield
            finally:
                for norm in self._norms[path]:
                    norm.training, norm.track_running_stats = False, True

    def add(self, path: str, frontier: Any, modality: Any, enough: int) -> None:
        """Keep a routed part of a batch until ``enough`` samples are together, then run module ``path``."""
        self._kinds[path] = modality
        self._pending[path].append(frontier)
        self._waiting[path] += modality.size(frontier)
        if self._waiting[path] >= enough:
            self._run(path)

    def flush(self) -> None:
        """Run what still waits."""
        for path in self.modules:
            if self._waiting[path] > 1:
                self._run(path)
        reached = all_reduce_sum(torch.tensor([self._seen[path] for path in self.modules]))
        for path, samples in zip(self.modules, reached.tolist(), strict=True):
            if not samples:
                logger.warning("BatchNorm of branch %s keeps its statistics: no two samples reach it", path)

    def _run(self, path: str) -> None:
        frontier = self._kinds[path].join(self._pending[path])
        with self.collecting(path):
            self.modules[path](*as_arguments(frontier))
        self._seen[path] += self._waiting[path]
        self._pending[path], self._waiting[path] = [], 0

    def _add(self, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        values = arguments[0].detach().float()
        others = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values, dim=others, correction=0)
        count = values.numel() // values.shape[1]
        mean, variance = mean.double(), variance.double()
        self._sums[norm] += count * torch.stack([torch.ones_like(mean), mean, variance + mean**2])

    def _write(self) -> None:
        for norm, sums in self._sums.items():
            count, first, second = all_reduce_sum(sums)
            if count[0] < 2:
                continue
            mean = first / count
            variance = (second / count - mean**2).clamp(min=0) * count / (count - 1)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


class _TreeWalk:
    """Hard routing of a batch down to the modules that a stage collects."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def stages(self) -> Iterator[dict[str, nn.Module]]:
        """Modules whose statistics are collected together, from the root outwards; those without are left out."""
        net = self.net
        yield from self._kept({"": net.backbone})
        branches = sorted(net.specializers, key=lambda key: (key.count("_"), key))
        for depth in sorted({key.count("_") for key in branches}):
            level = {key: net.specializers[key] for key in branches if key.count("_") == depth}
            yield from self._kept(level)
        yield from self._kept({f"head {key}": head for key, head in net.heads.items()})

    def run(self, inputs: Any, collection: _Collection) -> None:
        """Send one batch as far as the stage's modules."""
        net = self.net
        if "" in collection.modules:
            with collection.collecting(""):
                net.backbone(*as_arguments(inputs))
            collection._seen[""] += 1
            return
        frontier = net.backbone(*as_arguments(inputs))
        self._descend("", frontier, collection, net.modality.size(frontier))

    def _descend(self, node: str, frontier: Any, collection: _Collection, enough: int) -> None:
        net = self.net
        kind = net.modalities[node.count("/") + 1 if node else 0]
        if node not in net.inner_nodes:
            head = f"head {_key(node)}"
            if head in collection.modules:
                collection.add(head, frontier, kind, enough)
            return
        chosen = net.routers[_key(node)](kind.pool(frontier)).argmax(1)
        for branch in range(2):
            index = (chosen == branch).nonzero().flatten()
            if not len(index):
                continue
            child = f"{node}/{branch}" if node else str(branch)
            part = kind.take(frontier, index)
            if _key(child) in collection.modules:
                collection.add(_key(child), part, kind, enough)
            else:
                self._descend(child, net.specializers[_key(child)](*as_arguments(part)), collection, enough)

    @staticmethod
    def _kept(modules: dict[str, nn.Module]) -> Iterator[dict[str, nn.Module]]:
        kept = {path: module for path, module in modules.items() if _norms(module)}
        if kept:
            yield kept


def _key(path: str) -> str:
    return path.replace("/", "_") or "root"


def _norms(module: nn.Module) -> list[_BatchNorm]:
    """BatchNorms that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
