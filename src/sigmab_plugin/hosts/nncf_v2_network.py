"""Between plain modules and NNCF 2.x's ``NNCFNetwork``: take NNCF's classes off a model, put them on another."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from nncf.torch.dynamic_graph.context import get_current_context
from nncf.torch.layers import NNCF_MODULES_DICT, NNCF_PADDING_VALUE_ATTR_NAME, NNCF_WRAPPED_USER_MODULES_DICT
from nncf.torch.nncf_network import NNCFNetwork
from nncf.torch.utils import training_mode_switcher
from torch import Tensor, nn

from ..tree.net import SigmaBNet
from ..tree.plan import module_key, prefixes
from ..tuning.losses import hard_leaf


def unwrap(network: nn.Module) -> nn.Module:
    """Undo ``NNCFNetwork(model)`` in place: the same object with its own classes again, hooks gone."""
    if not isinstance(network, NNCFNetwork):
        return network
    interface = network.nncf
    wrapped_user = {wrapped: original for original, wrapped in NNCF_WRAPPED_USER_MODULES_DICT.items()}
    for module in list(network.modules()):
        native = NNCF_MODULES_DICT.get(type(module)) or wrapped_user.get(type(module))
        if native is not None:
            for name in ("pre_ops", "post_ops"):
                module._modules.pop(name, None)
            module._buffers.pop(NNCF_PADDING_VALUE_ATTR_NAME, None)
            module.__class__ = native
    network._modules.pop("_nncf", None)
    network.__class__ = interface._original_class
    if interface._original_instance_forward is not None:
        network.__dict__["forward"] = interface._original_instance_forward
    else:
        network.__dict__.pop("forward", None)
    return network


def rewrap(model: nn.Module, like: Any) -> NNCFNetwork:
    """``model`` as an ``NNCFNetwork`` traced with the inputs, scopes and functions of the interface ``like``.

    ``like`` is the ``nncf`` attribute of the network that ``model`` was made from.
    """
    given_wrapper = like._wrap_inputs_fn
    own = getattr(like, "_NNCFNetworkInterface__input_info_based_input_wrapper", None)
    with training_mode_switcher(model, is_training=False):
        network = NNCFNetwork(
            model,
            input_info=like._input_info,
            dummy_forward_fn=like._user_dummy_forward_fn,
            wrap_inputs_fn=None if own is not None else given_wrapper,
            wrap_outputs_fn=like._wrap_outputs_fn,
            scopes_without_shape_matching=like._scopes_without_shape_matching,
        )
        network.nncf.get_tracing_context().disable_trace_dynamic_graph()
    return network


class TrainedOutput(Tensor):
    """The logits of a training step. The first loss computed on them tells the controller the targets.

    NNCF calls ``ctrl.loss()`` without arguments, but the responsibilities of eq. 6 need the targets. Everything else
    that is computed from these logits is a plain tensor.
    """

    _LOSSES = ("cross_entropy", "nll_loss", "cross_entropy_loss", "nll_loss_nd")
    _CARRIERS = ("log_softmax", "float", "double", "half", "bfloat16", "to", "type", "contiguous", "clone")
    step: Step

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        source = args[0] if args else kwargs.get("input")
        step = getattr(source, "step", None) if isinstance(source, TrainedOutput) else None
        if step is None:
            return result
        if name in cls._LOSSES:
            step.targets = args[1] if len(args) > 1 else kwargs["target"]
        elif name in cls._CARRIERS and isinstance(result, Tensor):
            return tagged(result, step)
        return result


class Step:
    """Leaf logits (B, K, C) and path log-probabilities (B, K) of the last training forward, and its targets."""

    def __init__(self, leaf_logits: Tensor, log_p: Tensor) -> None:
        # NNCF's traced tensors are a subclass with bookkeeping; the loss wants plain ones.
        self.leaf_logits = leaf_logits.as_subclass(Tensor)
        self.log_p = log_p.as_subclass(Tensor)
        self.targets: Tensor | None = None


def tagged(logits: Tensor, step: Step) -> TrainedOutput:
    output = logits.as_subclass(TrainedOutput)
    output.step = step
    return output


def _tag_output(module: Any, inputs: Any, output: Any) -> Any:
    """Forward hook of the network: NNCF's own wrappers have run, the logits are what the user gets."""
    step = module.__dict__.get("last_step")
    if module.training and step is not None and torch.is_grad_enabled() and isinstance(output, Tensor):
        return tagged(output, step)
    return output


class _Pool(nn.Module):
    """Pooling in a scope of its own, one per router.

    Pooled features get a quantizer. In the net's own scope it would be addressed by the order of calls, which differs
    between soft and hard routing.
    """

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self._kind = kind

    def forward(self, frontier: Any) -> Tensor:
        pooled: Tensor = self._kind.pool(frontier)
        return pooled


def _hooked(network: Any, method: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """``method(*inputs, **named)`` with NNCF's hooks, quantizers of activations among them.

    The hooks act only inside ``NNCFNetwork.forward``, so that ``method`` takes the place of the tree's own forward
    in it for this call. Distillation compares outputs of that forward, so it is off meanwhile.
    """
    if not isinstance(network, NNCFNetwork) or get_current_context() is not None:
        return method(*inputs, **named)
    if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) and not named:
        inputs = tuple(inputs[0])
    interface = network.nncf
    distillation, interface._kd_loss_handler = interface._kd_loss_handler, None
    forward, interface._bound_original_forward = interface._bound_original_forward, method
    try:
        result = network(*inputs, **named)
    finally:
        interface._bound_original_forward = forward
        interface._kd_loss_handler = distillation
    if isinstance(result, tuple):
        return tuple(value.as_subclass(Tensor) for value in result)
    return result.as_subclass(Tensor)


class _TreeForNNCF:
    """Mixed into the class of a SigmaB net inside an ``NNCFNetwork``.

    * Whenever NNCF builds a graph, routing is soft: a hard forward shows one path only.
    * A training forward keeps what the controller's loss needs.
    * The other ways through the net (``loss``, ``route``, ``forward_leaves`` ...) run with NNCF's hooks, too.
    """

    def _soft(self: Any) -> bool:
        context = get_current_context()
        if context is not None and context.trace_dynamic_graph:
            return True
        return bool(super()._soft())  # type: ignore[misc]

    def _router_logits(self: Any, path: str, frontier: Any) -> Tensor:
        key = module_key(path)
        logits: Tensor = self.routers[key](self.pools[key](frontier))
        return logits

    def _all_leaves(self: Any, frontier: Any) -> tuple[Tensor, Tensor]:
        leaf_logits, log_p = super()._all_leaves(frontier)  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():
            self.__dict__["last_step"] = Step(leaf_logits, log_p)
        return leaf_logits, log_p

    def forward_leaves(self: Any, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        logits, log_p = _hooked(self, super().forward_leaves, inputs, named)  # type: ignore[misc]
        return logits, log_p

    def forward_routed(self: Any, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        logits, index = _hooked(self, super().forward_routed, inputs, named)  # type: ignore[misc]
        return logits, index

    def route(self: Any, *inputs: Any, **named: Any) -> Tensor:
        index: Tensor = _hooked(self, super().route, inputs, named)  # type: ignore[misc]
        return index

    def forward_selected(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Hard routing with every leaf computed: the same logits, as one static graph for exporters."""
        leaf_logits, log_p = self.forward_leaves(*args, **kwargs)
        chosen = nn.functional.one_hot(hard_leaf(log_p, self.leaves), len(self.leaves)).to(leaf_logits.dtype)
        return (chosen.unsqueeze(2) * leaf_logits).sum(dim=1)

    def __getstate__(self: Any) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "last_step"}


def adopt(net: SigmaBNet, dense: nn.Module) -> SigmaBNet:
    """Prepare ``net`` for NNCF: the class above, with the forward signature of ``dense``.

    NNCF marks a model's inputs by parameter name and skips ``*args``.
    """
    base = type(net)
    if issubclass(base, _TreeForNNCF):
        return net

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    cls = type(base.__name__, (_TreeForNNCF, base), {"__module__": base.__module__, "forward": forward})
    signature = inspect.signature(type(dense).forward)
    cls.forward.__signature__ = signature  # type: ignore[attr-defined]
    net.__class__ = cls
    pools = {module_key(path): _Pool(net.modalities[len(prefixes(path))]) for path in net.inner_nodes}
    net.pools = nn.ModuleDict(pools)
    net.register_forward_hook(_tag_output)
    return net


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the user's parameters and buffers, without what NNCF has added."""
    return {
        name: tensor.detach().clone()
        for name, tensor in network.state_dict().items()
        if not name.startswith("_nncf.")
        and ".pre_ops." not in name
        and not name.endswith(NNCF_PADDING_VALUE_ATTR_NAME)
    }
