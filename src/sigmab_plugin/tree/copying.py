"""Every branch gets a copy of its layers: what has no copy is better said before anything is built."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def check_copied(modules: Iterable[nn.Module]) -> None:
    """Raises ModelError, naming module and attribute, where a module cannot be copied."""
    for module in modules:
        tensors = _tensors(module)
        try:
            copy.deepcopy(module, dict(tensors))
        except Exception as error:
            for name, inner in module.named_modules():
                for key, value in _attributes(inner).items():
                    _check_attribute(name, key, value, dict(tensors))
            raise ModelError(
                f"a layer cannot be copied, and every branch gets a copy of its layers: {error}"
            ) from error


def _check_attribute(name: str, key: str, value: Any, memo: dict[int, Any]) -> None:
    try:
        copy.deepcopy(value, memo)
    except Exception as error:
        raise ModelError(
            f"attribute {key!r} of module {name!r}, a {type(value).__name__}, cannot be copied, and every branch gets "
            f"a copy of its layers: {error}. Delete it, detach it if it is a tensor, or create it when it is first used"
        ) from error


def _attributes(module: nn.Module) -> dict[str, Any]:
    registries = ("_modules", "_parameters", "_buffers")
    own = {key: value for key, value in vars(module).items() if key not in registries}
    return {**own, **module._parameters, **module._buffers}


def _tensors(module: nn.Module) -> dict[int, Any]:
    """Memo by which deepcopy shares the tensors that a branch gets copies of anyway."""
    plain = (value for inner in module.modules() for value in vars(inner).values() if torch.is_tensor(value))
    registered = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_leaf)
    return {id(tensor): tensor for tensor in (*plain, *registered)}
