"""Deployment: bundles with one artefact per node, and a runner that reads only the path an input takes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import export, export_chain
    from .manifest import Manifest, read_manifest
    from .runner import Result, Runner
    from .single_file import export_single_file

# name -> module that defines it; loaded on first use, so that a runner needs no torch.
_PUBLIC = {
    "Manifest": ".manifest",
    "Result": ".runner",
    "Runner": ".runner",
    "export": ".bundle",
    "export_chain": ".bundle",
    "export_single_file": ".single_file",
    "read_manifest": ".manifest",
}

__all__ = ["Manifest", "Result", "Runner", "export", "export_chain", "export_single_file", "read_manifest"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value
