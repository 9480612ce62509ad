"""Runtimes that compute a node: one module each, imported when asked for."""

from __future__ import annotations

from importlib import import_module

from ...errors import ConfigError
from ..manifest import Manifest
from .base import Backend, Bound

#: Runtime -> its module, and the bundle formats that it runs.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnxruntime": (".onnxruntime", ("onnx",)),
    "openvino": (".openvino", ("openvino",)),
    "torch": (".torch", ("torch",)),
    "torch-compiled": (".torch_compiled", ("torch",)),
    "executorch": (".executorch", ("executorch",)),
}

__all__ = ["BACKENDS", "Backend", "Bound", "open_backend"]


def open_backend(name: str | None, manifest: Manifest, *, threads: int | None) -> Backend:
    """The backend called ``name``, or the one that the bundle was exported for.

    Raises:
        ConfigError: unknown, or it does not run this bundle's format.
        MissingDependencyError: its runtime is not installed.
    """
    fitting = [key for key, (_, formats) in BACKENDS.items() if manifest.format in formats]
    if name is None:
        if not fitting:
            raise ConfigError(f"no backend runs bundles of format {manifest.format!r}")
        name = fitting[0]
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if name not in fitting:
        raise ConfigError(
            f"backend {name!r} runs format {', '.join(BACKENDS[name][1])}; this bundle is {manifest.format!r}: "
            f"use backend={fitting[0]!r} or export again"
        )
    module = import_module(BACKENDS[name][0], __name__)
    backend: Backend = module.open_backend(manifest, threads=threads)
    return backend
