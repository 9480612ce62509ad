"""Where a network can be cut: the single frontiers of its torch.fx graph.

A *single frontier* is a value through which everything after it is computed: no other activation, and no
input, crosses it; sizes, such as the number of samples, may. On a residual network these are the block boundaries,
never the inside of a block.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from ...counting import as_arguments
from ...errors import ConfigError, ModelError

#: What belongs to the layer before it: a cut never separates these from their convolution.
_TRAILING_MODULES = (
    nn.modules.batchnorm._BatchNorm,
    *(nn.GroupNorm, nn.LayerNorm, nn.Identity, nn.modules.dropout._DropoutNd),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Sigmoid, nn.Tanh, nn.Mish, nn.Hardtanh),
)
_TRAILING_FUNCTIONS = frozenset(
    {
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "gelu",
        "silu",
        "hardswish",
        "sigmoid",
        "tanh",
        "dropout",
        "batch_norm",
    }
)
#: Reading these of a tensor reads none of its values.
_SIZE_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
_SIZE_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement"})
_PADDING_MODULES = tuple(
    getattr(nn, f"{kind}Pad2d") for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
)


_Call = tuple[str, int]
_CALLS = "calls"


@dataclass(frozen=True)
class CutPoint:
    """One place to cut: what is kept ends with ``name``.

    Attributes:
        name: the outermost module that ends here, else the module or operation that ran last.
        aliases: other names of the same place (inner modules that end here).
        position: index in the order of execution.
        shape: (B, C, H, W) of the value that crosses the cut.
        is_block: a module with children ends here.
    """

    name: str
    aliases: tuple[str, ...]
    position: int
    shape: tuple[int, ...]
    is_block: bool

    @property
    def channels(self) -> int:
        return self.shape[1]


@dataclass(frozen=True)
class TracedModel:
    """The graph of a copy of the model, in eval mode, with the shapes of one run."""

    graph: fx.GraphModule
    cuts: tuple[CutPoint, ...]
    output_shape: tuple[int, ...]

    def find(self, name: str) -> CutPoint:
        """The cut called ``name``.

        Raises:
            ConfigError: there is no such cut; the message lists those there are.
        """
        for cut in self.cuts:
            if name in (cut.name, *cut.aliases):
                return cut
        known = ", ".join(cut.name for cut in self.cuts)
        raise ConfigError(f"depth_pruning: no cut after {name!r}. The model can be cut after: {known}")


class _Tracer(fx.Tracer):
    """Does not look into ``whole`` modules, nor into torch's own; notes the calls that each node is made in.

    A call is (module name, number): a module that is called twice has two calls.
    """

    def __init__(self, whole: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.whole = whole
        self._calls: list[_Call] = []
        self._number = 0

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._number += 1
        self._calls.append((self.path_of_module(m), self._number))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._calls.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[_CALLS] = tuple(self._calls)
        return node


def _trace(model: nn.Module, tracer: fx.Tracer) -> fx.Graph:
    try:
        return tracer.trace(model)
    except Exception as error:
        raise ModelError(
            f"depth_pruning: torch.fx cannot trace {type(model).__name__}: {error}. "
            "Take data-dependent control flow out of forward(), or wrap it in a module that torch.fx keeps whole."
        ) from error


def trace(model: nn.Module, example_inputs: Any) -> TracedModel:
    """Trace a copy of ``model`` and find every place where it can be cut.

    Args:
        model: any network that torch.fx traces; it is left as it was.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted.

    Raises:
        ModelError: not traceable, or no single frontier is a 2-D feature map (B, C, H, W).
    """
    clone = copy.deepcopy(model).eval()
    traced = fx.GraphModule(clone, _trace(clone, _Tracer()))
    with torch.no_grad():
        output = ShapeProp(traced).propagate(*as_arguments(example_inputs))
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"depth_pruning: the model returns {type(output).__name__}, a tensor of logits is needed; "
            "wrap the model so that forward() returns the logits alone"
        )
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    cuts = tuple(_cut_points(traced, nodes))
    if not cuts:
        raise ModelError(
            f"depth_pruning: {type(model).__name__} has no single frontier with a feature map (B, C, H, W); "
            "the auxiliary head is convolutional and works on 2-D maps only"
        )
    return TracedModel(traced, cuts, tuple(output.shape))


def enumerate_cuts(
    model: nn.Module, example_inputs: Any, *, granularity: str = "block"
) -> tuple[CutPoint, ...]:
    """Every place where ``model`` can be cut, in order of execution.

    Args:
        granularity: ``"block"`` (ends of modules that have children) or ``"layer"`` (all).
    """
    if granularity not in ("block", "layer"):
        raise ConfigError(f"depth_pruning: granularity must be 'block' or 'layer'; got {granularity!r}")
    return tuple(cut for cut in trace(model, example_inputs).cuts if granularity == "layer" or cut.is_block)


def _cut_points(traced: fx.GraphModule, nodes: list[fx.Node]) -> list[CutPoint]:
    position = {node: index for index, node in enumerate(nodes)}
    end = len(nodes)
    constant = _constant(traced.graph)
    used = _used(traced.graph) - constant
    last_use = {
        node: max((position.get(user, end) for user in node.users if user in used), default=-1)
        for node in nodes
        if node in used
    }
    last_in_module: dict[str, int] = {}
    for node in nodes:
        for name in _enclosing(node):
            last_in_module[name] = position[node]
    cuts = []
    live: set[fx.Node] = set()
    for node in nodes:
        index = position[node]
        if node in last_use and last_use[node] > index:
            live.add(node)
        live = {other for other in live if last_use[other] > index}
        shape = _map_shape(node)
        if live != {node} or shape is None or node.op == "placeholder":
            continue
        if _is_inside_layer(traced, node, [user for user in node.users if user not in constant]):
            continue
        ending = [name for name in _enclosing(node) if last_in_module[name] == index]
        name = ending[0] if ending else node.name
        is_block = any(not (node.op == "call_module" and node.target == inner) for inner in ending)
        cuts.append(CutPoint(name, tuple(ending[1:]), index, shape, is_block))
    return cuts


def _constant(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that no activation goes into: parameters, sizes, and what is computed from these alone."""
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op != "placeholder" and (_reads_size(node) or all(source in constant for source in inputs)):
            constant.add(node)
    return constant


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SIZE_METHODS


def _used(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on, the output included."""
    used: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "output" or any(user in used for user in node.users):
            used.add(node)
    return used


def _enclosing(node: fx.Node) -> list[str]:
    """Names of the modules around ``node``, outermost first."""
    return [name for name, _ in node.meta[_CALLS]]


def _map_shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    if not isinstance(meta, TensorMetadata) or len(meta.shape) != 4 or not meta.dtype.is_floating_point:
        return None
    return tuple(meta.shape)


def _is_inside_layer(traced: fx.GraphModule, node: fx.Node, readers: list[fx.Node]) -> bool:
    """A padding, or a value whose only reader normalises or activates it: the layer is not over yet."""
    if node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), _PADDING_MODULES):
        return True
    if len(readers) != 1:
        return False
    reader = readers[0]
    if reader.op == "call_module":
        return isinstance(traced.get_submodule(str(reader.target)), _TRAILING_MODULES)
    name = reader.target if reader.op == "call_method" else getattr(reader.target, "__name__", "")
    return name in _TRAILING_FUNCTIONS


def kept_part(model: nn.Module, traced: TracedModel, cut: CutPoint) -> fx.GraphModule:
    """A copy of everything up to ``cut``: inputs -> (B, C, H, W).

    Modules that are kept completely stay whole, with their names, so that what follows (another
    technique, a config file) can refer to them. Operations written directly into the forward() of a
    module that is cut through are fixed as they are in eval mode.
    """
    clone = copy.deepcopy(model).eval()
    fine = [node for node in traced.graph.graph.nodes if node.op != "output"]
    kept: set[str] = set()
    dropped: set[str] = set()
    for index, node in enumerate(fine):
        (kept if index <= cut.position else dropped).update(_enclosing(node))
    graph = _trace(clone, _Tracer(frozenset(kept - dropped)))
    end = _coarse_node(graph, fine, cut.position)
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            node.args = (end,)
        elif not node.users and node.op != "placeholder":
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(clone, graph, f"{type(model).__name__}Kept")


def _coarse_node(graph: fx.Graph, fine: list[fx.Node], position: int) -> fx.Node:
    """The node of the coarse ``graph`` whose run of ``fine`` nodes ends at ``position``.

    Both graphs list the same execution; a module that was kept whole covers the run of its call. Only what takes its
    output apart, where it returns several values, has no node in the fine graph.
    """
    index = 0
    for node in graph.nodes:
        if node.op == "call_module":
            call = next((call for call in fine[index].meta[_CALLS] if call[0] == node.target), None)
            while call is not None and index < len(fine) and call in fine[index].meta[_CALLS]:
                index += 1
        elif index < len(fine) and (node.op, node.target) == (fine[index].op, fine[index].target):
            index += 1
        if index - 1 == position:
            return node
    raise ModelError("depth_pruning: the two traces of the model differ; its forward() is not deterministic")
