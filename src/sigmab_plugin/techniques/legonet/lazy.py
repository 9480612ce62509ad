"""A network whose nodes are expanded from a packed file when they first run."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...errors import FormatError, ModelError
from .storage import LazyPackedModel


class LazyNodes:
    """Expands nodes of a packed network on first use; a tree in hard routing reads only the paths it takes.

    The nodes' parameters are on the meta device until then. ``net`` is used as any module; training, whole
    state dicts and other devices need :func:`load_packed` instead. Close it, or use it as a context manager.

    Args:
        path: file of :func:`save_packed`.
        model: a network of the packed architecture; copied, its weights are not used.
        nodes: names of the modules to expand separately; by default a tree's backbone, routers,
            specializers and heads, or the children of any other module.

    Attributes:
        net: the copy, in eval mode.

    Raises:
        FormatError: the file cannot be used.
        ModelError: parameters outside all nodes, or a name that is no module.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module, *, nodes: Sequence[str] | None = None
    ) -> None:
        self.nodes = tuple(_nodes(model) if nodes is None else nodes)
        outside = [n for n in model.state_dict() if not any(n.startswith(f"{node}.") for node in self.nodes)]
        if outside:
            raise ModelError(
                f"{outside[0]!r} belongs to none of the nodes {list(self.nodes)}; name its module in nodes"
            )
        self._file = LazyPackedModel(path)
        self._resident: dict[str, int] = {}
        # Entries already in deepcopy's memo are taken as they are: no weight is copied.
        parameters = {id(parameter) for parameter in model.parameters()}
        memo: dict[int, Any] = {}
        for tensor in model.state_dict(keep_vars=True).values():
            meta = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if id(tensor) in parameters else meta
        self.net = copy.deepcopy(model, memo).eval()
        self._hooks = [
            self.net.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: self.acquire(name))
            for name in self.nodes
        ]

    def acquire(self, name: str) -> None:
        """Read and expand node ``name`` unless it is resident, for example ahead of its use.

        Raises:
            FormatError: the file holds no such node, or one of another shape, or is damaged.
        """
        if name in self._resident:
            return
        state = self._file.expand(name)
        try:
            self.net.get_submodule(name).load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise FormatError(
                f"{self._file.path} does not fit {name!r} of this {type(self.net).__name__}; build it with the "
                f"options it was packed with. {error}"
            ) from error
        self._resident[name] = sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    def release(self, name: str) -> None:
        """Drop the weights of node ``name``; its next use reads them again."""
        if self._resident.pop(name, None) is not None:
            module = self.net.get_submodule(name)
            state = {key: tensor.detach().to("meta") for key, tensor in module.state_dict().items()}
            module.load_state_dict(state, assign=True)

    @property
    def resident(self) -> dict[str, int]:
        """Bytes of expanded weights, by node."""
        return dict(self._resident)

    def close(self) -> None:
        """Close the file and stop reading; nodes that are resident stay usable."""
        for hook in self._hooks:
            hook.remove()
        self._file.__exit__(None, None, None)

    def __enter__(self) -> LazyNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nodes(model: nn.Module) -> Sequence[str]:
    leaves = getattr(model, "leaves", None)
    if leaves is None:
        return [name for name, child in model.named_children() if child.state_dict()]
    names = [name for leaf in leaves for name, module in model.path_modules(leaf) if module.state_dict()]  # type: ignore[operator]
    return list(dict.fromkeys(names))
