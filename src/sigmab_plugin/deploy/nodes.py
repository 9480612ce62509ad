"""Cutting a net into the modules that become artefacts.

backbone + root's router | specializer + its router, per inner node | specializer + head, per leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..counting import as_arguments, parameter_count
from ..errors import ModelError


@dataclass(frozen=True)
class NodeSource:
    """A node before export: its module takes and returns flat tensors only."""

    path: str
    key: str
    role: str
    children: tuple[str, ...]
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_example: tuple[Tensor, ...]

    @property
    def parameters(self) -> int:
        return parameter_count(self.module)

    def __str__(self) -> str:
        return f"node {self.path or 'root'!r} ({self.role})"


def module_key(path: str) -> str:
    """Key of a node's module: "root" for the root, "/" replaced by "_" elsewhere."""
    return path.replace("/", "_") or "root"


def children_of(path: str, known: Sequence[str]) -> tuple[str, ...]:
    """Direct children of ``path`` among ``known``, in branch order."""
    prefix = f"{path}/" if path else ""
    found = [p for p in known if p and p.startswith(prefix) and "/" not in p[len(prefix) :]]
    return tuple(sorted(found, key=lambda p: int(p.rsplit("/", 1)[-1])))


def _flat(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _pool_points(frontier: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The modality's mean per cloud in operations that exporters know (no bincount, no index_add)."""
    x, _, batch = frontier
    clouds = int(batch.max()) + 1
    index = batch.unsqueeze(1)
    sums = x.new_zeros(clouds, x.shape[1]).scatter_add(0, index.expand_as(x), x)
    counts = x.new_zeros(clouds, 1).scatter_add(0, index, x.new_ones(x.shape[0], 1))
    return sums / counts.clamp(min=1)


class _Inner(nn.Module):
    """body (backbone or specializer), then pooling and the router: frontier tensors, then logits."""

    def __init__(self, body: nn.Module, router: nn.Module, modality: Any) -> None:
        super().__init__()
        self.body, self.router = body, router
        self._pool = _pool_points if modality.name == "points" else modality.pool

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        frontier = self.body(*inputs)
        return (*_flat(frontier), self.router(self._pool(frontier)))


class _Leaf(nn.Module):
    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.head(*_flat(self.body(*inputs))))


class _Chained(nn.Module):
    """A plain module as one link of a chain: flat tensors in, flat tensors out."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.body(*inputs))


class _Given(nn.Module):
    """Stands for a backbone that runs elsewhere: its frontier comes in as the inputs."""

    def forward(self, *frontier: Tensor) -> Any:
        return frontier if len(frontier) > 1 else frontier[0]


def cut(net: Any, example_inputs: Any, *, backbone: bool = True) -> tuple[NodeSource, ...]:
    """Cut a SigmaB net, depth first: root, "0", "0/0", "0/1", "1", ...

    ``example_inputs`` is a batch (or the positional arguments); a batch of one is doubled, because
    a traced batch of one would be taken for a constant. Without ``backbone`` the root takes the frontier
    and only routes. Call inside :func:`~sigmab_plugin.modes.evaluating`.
    """
    inputs = _at_least_two(as_arguments(example_inputs))
    names = _names("input", len(inputs))
    start: nn.Module = net.backbone
    if not backbone:
        inputs, start = _run(net.backbone, inputs, "", "backbone"), _Given()
        names = _names("frontier", len(inputs))
    known = (*net.inner_nodes, *net.leaves)
    sources: list[NodeSource] = []

    def visit(path: str, example: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
        key, root = module_key(path), path == ""
        if path in net.leaves:
            leaf = _Leaf(net.specializers[key], net.heads[key]).eval()
            out = _run(leaf, example, path, "leaf")
            sources.append(
                _checked(NodeSource(path, key, "leaf", (), leaf, example, names, ("logits",), out))
            )
            return
        body = start if root else net.specializers[key]
        depth = path.count("/") + 1 if path else 0
        module = _Inner(body, net.routers[key], net.modalities[depth]).eval()
        role = "backbone" if root else "inner"
        out = _run(module, example, path, role)
        frontier_names = _names("frontier", len(out) - 1)
        children = children_of(path, known)
        outputs = (*(f"{name}_out" for name in frontier_names), "router_logits")
        sources.append(_checked(NodeSource(path, key, role, children, module, example, names, outputs, out)))
        if out[-1].shape[1:] != (len(children),):
            raise ModelError(
                f"{sources[-1]}: its router returns {tuple(out[-1].shape)} for {len(children)} branches: "
                "it must return one logit per branch, (batch, branches)"
            )
        for child in children:
            visit(child, out[:-1], frontier_names)

    visit("", inputs, names)
    return tuple(sources)


def chain(modules: Sequence[nn.Module], example_inputs: Any) -> tuple[NodeSource, ...]:
    """Links of an unbranched network (a dense network or a static twin): a path without routers.

    The links are named "", "0", "0/0", ...; the last one is the only leaf.
    """
    if not modules:
        raise ModelError("a chain needs at least one module")
    example = _at_least_two(as_arguments(example_inputs))
    names = _names("input", len(example))
    sources, path = [], ""
    for index, module in enumerate(modules):
        last = index == len(modules) - 1
        link = _Chained(module).eval()
        role = "leaf" if last else ("backbone" if index == 0 else "inner")
        out = _run(link, example, path, role)
        child = f"{path}/0" if path else "0"
        frontier_names = _names("frontier", len(out))
        outputs = ("logits",) if last else tuple(f"{name}_out" for name in frontier_names)
        children = () if last else (child,)
        key = module_key(path)
        sources.append(_checked(NodeSource(path, key, role, children, link, example, names, outputs, out)))
        path, example, names = child, out, frontier_names
    return tuple(sources)


def _names(stem: str, count: int) -> tuple[str, ...]:
    return (stem,) if count == 1 else tuple(f"{stem}_{i}" for i in range(count))


def _run(module: nn.Module, inputs: tuple[Tensor, ...], path: str, role: str) -> tuple[Tensor, ...]:
    """``module(*inputs)``, in memory as the runner hands it on.

    Raises:
        ModelError: it fails, or returns other things than tensors; names the node and the shapes.
    """
    where = f"node {path or 'root'!r} ({role})"
    try:
        found = _flat(module(*inputs))
    except Exception as error:  # a forward pass may raise anything
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ModelError(
            f"{where} cannot take inputs of shape {shapes}: "
            f"{type(error).__name__}: {reason}. Give example inputs as the network takes them, batch first"
        ) from error
    for value in found:
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{where} returns a {type(value).__name__}: make it return a tensor, or a tuple of tensors"
            )
    return tuple(value.contiguous() for value in found)


def _checked(source: NodeSource) -> NodeSource:
    """``source``, if bundles can hold its numbers.

    Raises:
        ModelError: some are bfloat16, or a leaf returns more than its logits; names the node.
    """
    if source.role == "leaf" and len(source.output_example) != 1:
        raise ModelError(
            f"{source} returns {len(source.output_example)} tensors: make it return its logits alone"
        )
    tensors = {**dict(source.module.named_parameters()), **dict(source.module.named_buffers())}
    tensors.update(zip(source.outputs, source.output_example, strict=True))
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            raise ModelError(
                f"{source}: {name} is bfloat16, which NumPy arrays cannot hold: call .float() on the network"
            )
    return source


def check_net(net: Any) -> None:
    """Whether ``net`` is a tree that :func:`cut` can cut.

    Raises:
        ModelError: it is not; says what to call instead.
    """
    parts = ("backbone", "routers", "specializers", "heads", "leaves", "inner_nodes", "modality")
    if not all(hasattr(net, name) for name in parts):
        raise ModelError(
            f"{type(net).__name__} is not a SigmaB net, which this export cuts at its routers: use "
            "export_chain([model], ...) for an unbranched network, or restructure it with SigmaBPruner first"
        )


def _at_least_two(inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if not inputs:
        raise ModelError("the export needs example inputs: pass a batch, or a tuple of positional arguments")
    for value in inputs:
        if not isinstance(value, Tensor):
            raise ModelError(
                f"example inputs must be tensors to be exported; got {type(value).__name__}: "
                "pass the positional tensors that the backbone takes"
            )
        if value.dtype == torch.bfloat16:
            raise ModelError(
                "example inputs are bfloat16, which the runner's NumPy arrays cannot hold: call .float() on the "
                "network and on them"
            )
        if value.ndim == 0 or value.shape[0] == 0:
            raise ModelError(f"an example input has no samples: its shape is {tuple(value.shape)}")
    inputs = tuple(value.contiguous() for value in inputs)  # the order in memory that runners hand over
    if inputs[0].shape[0] >= 2 or len({v.shape[0] for v in inputs}) > 1:
        return inputs
    return tuple(torch.cat([v, v]) for v in inputs)
