"""torch bundles through ``torch.compile``: each node is compiled at its first call, its weights stay inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ...errors import SigmaBError
from ..manifest import Manifest, Node
from .torch import Torch


class _Compiled:
    """A compiled program; says which node it was if the compiler fails."""

    def __init__(self, node: Node, program: Callable[..., Any]) -> None:
        self._name = node.path or "root"
        self._program = torch.compile(program)
        self._lock = threading.Lock()
        self._ready = False

    def __call__(self, *arguments: Any) -> Any:
        if self._ready:
            return self._program(*arguments)
        with self._lock:  # compiling is not for two threads at once
            try:
                result = self._program(*arguments)
            except Exception as error:  # the stages of the compiler raise many kinds
                reason = str(error).strip().partition("\n")[0]
                raise SigmaBError(
                    f"node {self._name!r}: torch.compile failed: {type(error).__name__}: {reason}. "
                    "It needs a C++ compiler; use backend='torch' without one"
                ) from error
            self._ready = True
            return result


class TorchCompiled(Torch):
    """Loads cost what they cost with ``torch``; the first call of a node, and of a new batch size, compiles."""

    name = "torch-compiled"

    def program(self, node: Node, data: bytes) -> Any:
        return _Compiled(node, super().program(node, data))


def open_backend(manifest: Manifest, *, threads: int | None) -> TorchCompiled:
    return TorchCompiled(threads)
