"""SigmaB for Torch-Pruning and NNCF: turn a pretrained network into a routed tree that runs one path per input.

The public names load on first use, so that ``import sigmab_plugin`` costs next to nothing: it imports neither torch
nor a host framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import errors
    from .config import SigmaBConfig
    from .hosts.torch_pruning import SigmaBPruner
    from .tree import SigmaBNet, load, save, static_twin
    from .tuning import finetune

# name -> module that defines it
_PUBLIC = {
    "SigmaBConfig": ".config",
    "SigmaBNet": ".tree",
    "SigmaBPruner": ".hosts.torch_pruning",
    "errors": ".errors",
    "finetune": ".tuning",
    "load": ".tree",
    "save": ".tree",
    "static_twin": ".tree",
}

__all__ = [
    "SigmaBConfig",
    "SigmaBNet",
    "SigmaBPruner",
    "__version__",
    "errors",
    "finetune",
    "load",
    "save",
    "static_twin",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_PUBLIC[name], __name__)
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
