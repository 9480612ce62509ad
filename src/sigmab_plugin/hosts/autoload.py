"""Make the installed techniques appear in their hosts with no import of ours.

Neither Torch-Pruning nor NNCF looks for plug-ins, but ``import torch`` (2.5 and later) calls every entry point of the
group ``torch.backends``. Ours, :func:`on_torch_import`, does no work there: it arms a post-import hook. When
``torch_pruning`` or ``nncf`` is imported, before or after torch, the hook registers what installed packages declare:

* group ``torch_pruning.pruners``: each becomes an attribute of ``torch_pruning.pruner``, loaded at first use;
* group ``nncf.algorithms``: NNCF 2.x learns the names (NNCF 3 has no registry and is reached by functions).

Nothing in here may break or slow down an import of torch or of a host: this module imports the standard library only,
and every error is caught and logged once. ``SIGMAB_AUTOLOAD=0`` in the environment turns the hook off.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

SWITCH = "SIGMAB_AUTOLOAD"
PRUNER_GROUP = "torch_pruning.pruners"
_OFFERS = "__sigmab_offers__"

Callback = Callable[[ModuleType], None]

_logger = logging.getLogger(__name__)
_lock = threading.RLock()
_callbacks: dict[str, list[Callback]] = {}
_reported: set[str] = set()


def on_torch_import() -> None:
    """Entry point of the group ``torch.backends``: arm the hook, unless switched off. Never raises."""
    if os.environ.get(SWITCH, "1").strip().lower() in {"0", "false", "no", "off"}:
        return
    try:
        install()
    except Exception as error:
        _report("arming the import hook", error)


def install() -> None:
    """Register with every host that is imported, now or later.

    ``import torch`` calls this where the package is installed. Call it yourself where the package is used without its
    metadata (vendored, or on ``PYTHONPATH``). Calling it again changes nothing.
    """
    after_import("torch_pruning", _register_torch_pruning)
    after_import("nncf", _register_nncf)


def after_import(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` each time the module ``name`` has been executed; at once if it already was.

    A module that is being imported right now is waited for. An error of the callback is logged, not raised.
    """
    with _lock:
        if not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _PostImportFinder())
        callbacks = _callbacks.setdefault(name, [])
        if callback in callbacks:
            return
        callbacks.append(callback)
    module = sys.modules.get(name)
    if module is None:
        return
    spec = getattr(module, "__spec__", None)
    if getattr(spec, "_initializing", False):
        _watch(spec)
    else:
        _call(callback, module)


# ---------------------------------------------------------------- the hook


class _PostImportFinder:
    """First on ``sys.meta_path``: lets the other finders find the awaited modules, and wraps their loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _callbacks:
            return None
        finders = list(sys.meta_path)
        # Those before this one have been asked already; asking them again could go round in circles.
        after = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in after:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is None:
                continue
            if hasattr(
                spec.loader, "exec_module"
            ):  # a namespace folder of that name has no loader: not the host
                spec.loader = _PostImportLoader(spec.loader)  # type: ignore[assignment]
            return spec
        return None


class _PostImportLoader:
    """Stands in for a loader until its module has been executed; the module keeps the real one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        module: ModuleType | None = create(spec) if create is not None else None
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _run_callbacks(module)


class _WatchedSpec(ModuleSpec):
    """Spec of a module that was half imported when the hook was armed, because it imports torch itself.

    The import system sets ``spec._initializing`` to False as its last step; that is the moment to register.
    """

    @property
    def _initializing(self) -> bool:
        return True

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        if value:
            return
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        vars(self)["_initializing"] = value
        module = sys.modules.get(self.name)
        if module is not None and module.__spec__ is self:  # absent where the import failed
            _run_callbacks(module)


def _watch(spec: Any) -> None:
    if type(spec) is ModuleSpec:
        spec.__class__ = _WatchedSpec
        if not vars(spec)["_initializing"]:  # another thread finished the import just now
            spec._initializing = False  # type: ignore[attr-defined]


def _run_callbacks(module: ModuleType) -> None:
    for callback in tuple(_callbacks.get(module.__name__, ())):
        _call(callback, module)


def _call(callback: Callback, module: ModuleType) -> None:
    try:
        callback(module)
    except Exception as error:
        _report(f"registering with {module.__name__}", error)


def _report(what: str, error: Exception) -> None:
    """Log once. Not a warning: a filter that turns warnings into errors would break the host's import."""
    if what not in _reported:
        _reported.add(what)
        _logger.warning(
            "sigmab-plugin failed while %s (%s: %s). Everything else works as before; "
            "set %s=0 to switch this off.",
            what,
            type(error).__name__,
            error,
            SWITCH,
        )


# ---------------------------------------------------------------- Torch-Pruning


def _register_torch_pruning(host: ModuleType) -> None:
    pruners = sys.modules.get(f"{host.__name__}.pruner")
    if pruners is not None:
        _offer(pruners)


def _offer(module: ModuleType) -> None:
    """Give ``module`` the declared pruners as lazy attributes (PEP 562), behind a ``__getattr__`` of its own."""
    namespace = vars(module)
    if _OFFERS in namespace and namespace["__getattr__"] is namespace[_OFFERS]:
        return
    host_getattr = namespace.get("__getattr__")
    host_dir = namespace.get("__dir__")

    def lazy_getattr(name: str) -> Any:
        if not name.startswith("_") and name in (declared := _declared_pruners()):
            value = _load(declared[name], module)
            namespace[name] = value
            return value
        if host_getattr is not None:
            return host_getattr(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    def full_dir() -> list[str]:
        return sorted({*(host_dir() if host_dir is not None else namespace), *_declared_pruners()})

    namespace["__getattr__"] = namespace[_OFFERS] = lazy_getattr
    namespace["__dir__"] = full_dir


def _load(entry: EntryPoint, module: ModuleType) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise AttributeError(
            f"{module.__name__}.{entry.name} is offered by {_origin(entry)}, which cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


_pruners: dict[str, EntryPoint] | None = None


def _declared_pruners() -> dict[str, EntryPoint]:
    """Name -> entry point; read once, when first asked, because reading every package's metadata takes a while."""
    global _pruners
    if _pruners is None:
        try:
            _pruners = _read_pruners()
        except Exception as error:
            _report(f"reading the entry points of group {PRUNER_GROUP}", error)
            _pruners = {}
    return _pruners


def _read_pruners() -> dict[str, EntryPoint]:
    from importlib.metadata import EntryPoint, entry_points

    package = __name__.rpartition(".")[0]
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=PRUNER_GROUP):
        first = found.setdefault(entry.name, entry)
        if first.value != entry.value:
            _logger.warning(
                "%s offers the pruner %r, but %s already does; the first is used.",
                _origin(entry),
                entry.name,
                _origin(first),
            )
    for name, module in OWN_PRUNERS.items():  # without our metadata
        found.setdefault(name, EntryPoint(name=name, value=f"{package}.{module}:{name}", group=PRUNER_GROUP))
    return found


# What pyproject.toml declares (name -> module of this package), for use without the package's metadata.
OWN_PRUNERS = {
    "SigmaBPruner": "torch_pruning",
    "MixAndMatchPruner": "torch_pruning_techniques",
    "LegoNetPruner": "torch_pruning_techniques",
    "DepthPruner": "torch_pruning_depth",
}


def _origin(entry: EntryPoint) -> str:
    distribution = getattr(entry, "dist", None)
    return f"{entry.value!r}" + (f" of {distribution.name}" if distribution is not None else "")


# ---------------------------------------------------------------- NNCF


def _register_nncf(host: ModuleType) -> None:
    if str(getattr(host, "__version__", "")).startswith("2."):
        import_module(f"{__name__.rpartition('.')[0]}.nncf_v2").register()
