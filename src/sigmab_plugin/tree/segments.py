"""Cut a model at named modules: backbone, one segment per level, head.

Tracing is symbolic (torch.fx) and goes only as deep as the named modules lie; everything else stays
an opaque leaf, so that control flow inside a layer is no obstacle. Segments share the modules of the
model and keep their qualified names.
"""

from __future__ import annotations

import difflib
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..errors import ConfigError, ModelError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segments:
    """A model in pieces: ``head(levels[-1](... levels[0](backbone(*inputs))))``, tuples splatted.

    Attributes:
        names: qualified names of the modules at which the model was cut, the head's last.
        forward_fn: how inputs are given to the backbone; default: :func:`call`.
    """

    backbone: nn.Module
    levels: tuple[nn.Module, ...]
    head: nn.Module
    names: tuple[str, ...]
    forward_fn: Callable[[nn.Module, Any], Any] | None = None

    def enter(self, inputs: Any) -> Any:
        """The backbone's output."""
        return (self.forward_fn or call)(self.backbone, inputs)

    @property
    def tail(self) -> tuple[nn.Module, ...]:
        return (*self.levels, self.head)

    @property
    def reference(self) -> torch.Tensor:
        """A tensor with the device and the dtype of the model's floating-point weights."""
        for module in (self.backbone, *self.tail):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    return tensor
        return torch.empty(0)


def call(module: Callable[..., Any], values: Any) -> Any:
    """``module`` on a frontier or on inputs: tuples and lists are splatted, dicts are keywords."""
    if isinstance(values, dict):
        return module(**values)
    if isinstance(values, (tuple, list)):
        return module(*values)
    return module(values)


def cut(model: nn.Module, *, levels: Sequence[str], head: str) -> Segments:
    """Cut ``model`` before each named level and before the head.

    Args:
        levels: qualified module names in order of execution; not nested in each other.
        head: qualified name of the module at which the classifier starts.

    Raises:
        ConfigError: a name is unknown, called more than once, nested, or out of order.
        ModelError: the model cannot be traced, or a cut is no single frontier; the message names
            what else crosses.
    """
    names = (*levels, head)
    _check_names(model, levels, head)
    own = set(vars(model))
    try:
        return _cut(model, names)
    finally:
        # The tracer hangs tensors that forward makes (torch.tensor(...)) on the model; the segments have theirs.
        for name in set(vars(model)) - own:
            delattr(model, name)


def _cut(model: nn.Module, names: tuple[str, ...]) -> Segments:
    graph = _trace(model, names)
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    position = {node: i for i, node in enumerate(nodes)}
    starts = [_call_of(nodes, name) for name in names]
    order = sorted(names, key=lambda name: position[starts[names.index(name)]])
    if tuple(order) != tuple(names):
        raise ConfigError(
            f"levels and head must be given in order of execution: {', '.join(order)}; got {', '.join(names)}"
        )
    frontiers = [_frontier(nodes, position, start) for start in starts]
    bounds = [0, *(position[start] for start in starts), len(nodes)]
    modules: list[nn.Module] = []
    for number in range(len(bounds) - 1):
        inputs = None if number == 0 else frontiers[number - 1]
        outputs = None if number == len(frontiers) else frontiers[number]
        modules.append(_segment(model, nodes[bounds[number] : bounds[number + 1]], inputs, outputs))
    return Segments(modules[0], tuple(modules[1:-1]), modules[-1], names)


def chain(modules: Sequence[nn.Module]) -> Segments:
    """Segments given by the user, where tracing is impossible: backbone, levels..., head."""
    if len(modules) < 3:
        raise ConfigError(
            f"segments needs a backbone, at least one level and a head; got {len(modules)} modules"
        )
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"segments takes modules, not {type(module).__name__}: wrap what is none in a module"
            )
    names = [f"segment{i}" for i in range(len(modules))]
    named = [_Named(name, module) for name, module in zip(names, modules, strict=True)]
    return Segments(named[0], tuple(named[1:-1]), named[-1], tuple(names[1:]))


class _Named(nn.Module):
    """A module under a name of its own: layers of two segments may bear the same name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        (module,) = self.children()
        return module(*inputs, **named)


def _check_names(model: nn.Module, levels: Sequence[str], head: str) -> None:
    known = dict(model.named_modules())
    if not levels:
        raise ConfigError("levels is empty: name at least one module at which the tree branches")
    if not head:
        raise ConfigError("head is missing: name the module at which the classifier starts, for example 'fc'")
    for name in (*levels, head):
        if not name or name not in known:
            inside = [other for other in known if other.endswith(f".{name}")] if name else []  # of a wrapper
            near = inside[:3] or difflib.get_close_matches(name, known, n=3)
            children = ", ".join(child for child, _ in model.named_children())
            hint = f"did you mean {', '.join(near)}?" if near else f"top-level modules: {children}"
            raise ConfigError(f"the model has no module {name!r}; {hint}")
    names = [*levels, head]
    for outer in names:
        for inner in names:
            if inner.startswith(outer + "."):
                raise ConfigError(f"{inner!r} lies inside {outer!r}: levels and head must not be nested")
    if len(set(names)) != len(names):
        raise ConfigError(f"levels and head name a module twice: {', '.join(names)}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"{name} is not initialised yet (lazy module): run the model once on real input first"
            )


class _Tracer(fx.Tracer):
    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(autowrap_functions=(), param_shapes_constant=False)
        self._names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(name.startswith(module_qualified_name + ".") for name in self._names)


def _trace(model: nn.Module, names: Sequence[str]) -> fx.Graph:
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        graph = _Tracer(names).trace(model)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}.forward cannot be traced down to {', '.join(names)}{_where(error)}: {error}. Move "
            "data-dependent Python into a submodule, or pass segments=[backbone, level, ..., head]."
        ) from error
    finally:
        for module, training in was_training.items():
            module.training = training
    for node in graph.nodes:
        if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
            _log.warning(
                "%s.forward calls functional %s: it stays off in the restructured net; use nn.Dropout to keep it",
                type(model).__name__,
                node.target.__name__,
            )
    return graph


def _where(error: Exception) -> str:
    """The last line of the model's own code that the error went through."""
    library = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename != __file__ and not frame.filename.startswith(library) and frame.line:
            return f" (line {frame.lineno} of {frame.filename}: {frame.line})"
    return ""


def _call_of(nodes: Sequence[fx.Node], name: str) -> fx.Node:
    calls = [node for node in nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1:
        raise ConfigError(
            f"module {name!r} is called {len(calls)} times in one forward pass; a cut needs exactly one"
        )
    return calls[0]


def _frontier(nodes: Sequence[fx.Node], position: dict[fx.Node, int], start: fx.Node) -> list[fx.Node]:
    """The values that enter ``start``; raises where anything else is computed before and used after."""
    at = position[start]
    arguments = [node for node in start.all_input_nodes if node.op != "get_attr"]
    for node in nodes[:at]:
        later = [user for user in node.users if position.get(user, -1) >= at]
        if later and node not in arguments:
            raise ModelError(
                f"{start.target!r} is no single frontier: the output of {_origin(node)} also crosses the cut "
                f"(used by {', '.join(_origin(user) for user in later)}). Cut at a module whose inputs are all that "
                "the rest of the network needs."
            )
    if not arguments:
        raise ModelError(f"{start.target!r} reads no computed value: nothing to cut")
    return arguments


def _origin(node: fx.Node) -> str:
    if node.op == "call_module":
        return repr(str(node.target))
    if node.op == "call_function":
        return f"{getattr(node.target, '__name__', node.target)}() [{node.name}]"
    return f"{node.op} {node.name}"


def _segment(
    model: nn.Module, nodes: Sequence[fx.Node], inputs: list[fx.Node] | None, outputs: list[fx.Node] | None
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs or ():
        copies[node] = graph.placeholder(node.name)

    def copied(node: fx.Node) -> fx.Node:
        # Parameters read by the forward itself are fetched where they are used.
        if node not in copies and node.op == "get_attr":
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copied)
    if outputs is not None:
        values = [copied(node) for node in outputs]
        graph.output(values[0] if len(values) == 1 else tuple(values))
    graph.lint()
    return fx.GraphModule(model, graph, class_name="Segment")
