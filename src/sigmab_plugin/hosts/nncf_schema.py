"""NNCF config files, whatever the installed NNCF: sections, the techniques that own them, and their checks.

A config file is ``{"input_info": ..., "compression": section or [sections], "ignored_scopes": [...]}``. Nothing here
imports NNCF, so that a file can be checked before it is.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TechniqueConfig
from ..errors import ConfigError, MissingDependencyError
from ..techniques.base import Technique
from ..techniques.compose import order_problems

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)

GROUP = "nncf.algorithms"


class SectionError(ConfigError):
    """A section, or the order of sections, cannot be used. On NNCF 2.x also a ``jsonschema.ValidationError``."""


@dataclass(frozen=True)
class Section:
    """One entry of ``compression``: the raw JSON, and the technique that owns it (None: NNCF's own)."""

    position: int
    algorithm: str
    values: dict[str, Any]
    technique: Technique | None = None

    @property
    def config(self) -> TechniqueConfig:
        """The checked section of a technique of the group ``nncf.algorithms``."""
        assert self.technique is not None
        return self.technique.config.from_dict(self.values)

    def __str__(self) -> str:
        return f"compression[{self.position}] ({self.algorithm})"


def nncf_version() -> tuple[int, int]:
    """(major, minor) of the installed NNCF, without importing it.

    Raises:
        MissingDependencyError: NNCF is not installed.
    """
    try:
        text = version("nncf")
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            "NNCF is not installed; pip install 'sigmab-plugin[nncf]' (any of 2.17 to 3.4)"
        ) from error
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@lru_cache(maxsize=1)
def techniques() -> dict[str, Technique]:
    """Algorithm name -> technique, from every installed package that declares the group ``nncf.algorithms``.

    A package that cannot be loaded is reported and left out; it must not take the others with it.
    """
    found: dict[str, Technique] = {}
    for entry in entry_points(group=GROUP):
        try:
            technique = entry.load()
        except Exception as error:
            _log.warning(
                "entry point %s = %s of group %s cannot be loaded: %s", entry.name, entry.value, GROUP, error
            )
            continue
        if not isinstance(technique, Technique) or technique.name != entry.name:
            _log.warning(
                "entry point %s = %s of group %s is no sigmab_plugin.techniques.base.Technique of that name; left out",
                entry.name,
                entry.value,
                GROUP,
            )
            continue
        if found.setdefault(entry.name, technique) is not technique:
            _log.warning("algorithm %r is offered twice; %s is left out", entry.name, entry.value)
    return found


def offered_names() -> tuple[str, ...]:
    """Names in the group ``nncf.algorithms``, without loading what they name."""
    return tuple(dict.fromkeys(entry.name for entry in entry_points(group=GROUP)))


def read(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The config as a dict: given as one, or as the path of a JSON file.

    Raises:
        ConfigError: the file does not exist or is no JSON object.
        SectionError: it has no section.
    """
    if isinstance(config, Mapping):
        return _with_sections(dict(config), "the config")
    path = Path(config)
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold a JSON object with a key 'compression'")
    return _with_sections(loaded, str(path))


def _with_sections(loaded: dict[str, Any], name: str) -> dict[str, Any]:
    """``loaded``, which must list something to do; one bare section becomes the list of it."""
    if "algorithm" in loaded and "compression" not in loaded:
        return {"compression": [loaded]}
    if not loaded.get("compression"):
        near = difflib.get_close_matches("compression", [key for key in loaded if key != "compression"], n=1)
        hint = f" Did you mean it by {near[0]!r}?" if near else ""
        raise SectionError(
            f"{name}: 'compression' is missing or empty; give one section or a list of sections.{hint}"
        )
    return loaded


def sections(config: Mapping[str, Any]) -> tuple[Section, ...]:
    """The entries of ``compression``, in order.

    Raises:
        SectionError: an entry is no object or has no ``algorithm``.
    """
    raw = config.get("compression", ())
    entries: Sequence[Any] = [raw] if isinstance(raw, Mapping) else raw
    result = []
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("algorithm"), str):
            raise SectionError(f"compression[{position}] must be an object with a key 'algorithm'")
        algorithm = entry["algorithm"]
        result.append(Section(position, algorithm, dict(entry), techniques().get(algorithm)))
    return tuple(result)


def check(config: Mapping[str, Any]) -> tuple[Section, ...]:
    """Check the techniques' sections and the order of all sections; returns :func:`sections`.

    Sections of NNCF's own algorithms are left to NNCF.

    Raises:
        SectionError: an unknown key, a wrong value, a technique twice, or an order that cannot work.
    """
    entries = sections(config)
    for section in entries:
        if section.technique is None:
            continue
        try:
            config_of_section = section.config
        except ConfigError as error:
            raise SectionError(f"{section}: {error}") from error
        if section.algorithm == "sigmab":
            _check_tree(config_of_section, section)
    _check_order(entries)
    return entries


def _check_tree(config: Any, section: Section) -> None:
    for key in ("levels", "head"):
        if not getattr(config, key):
            raise SectionError(
                f"{section}: {key!r} is missing; for a ResNet-50: levels ['layer3', 'layer4'], head 'fc'"
            )


def _check_order(entries: Sequence[Section]) -> None:
    """The rules of :mod:`..techniques.compose`, where a technique is concerned; NNCF's own lists are NNCF's matter."""
    for problem in order_problems([section.algorithm for section in entries]):
        earlier, later = entries[problem.earlier], entries[problem.later]
        if earlier.technique is None and later.technique is None:
            continue
        if earlier.algorithm == later.algorithm:
            raise SectionError(
                f"{later.algorithm} stands in the list twice: {earlier} and {later}; {problem.reason}."
            )
        text = f"{later} stands after {earlier}: {problem.reason}."
        if problem.proposal:
            order = ", ".join(f'{{"algorithm": "{name}", ...}}' for name in problem.proposal)
            text += f" Put {later.algorithm!r} before {earlier.algorithm!r}: [{order}]."
        raise SectionError(text)


def module_path(scope: str) -> str:
    """Qualified module name in an NNCF 2.x scope.

    ``"ResNet/Sequential[layer3]/NNCFConv2d[conv1]/conv2d_0"`` -> ``"layer3.conv1"``, and so does NNCF 3's
    ``"layer3/conv1/conv2d/0"``.
    """
    parts = scope.split("/")
    if any("[" in part for part in parts):
        return ".".join(part[part.index("[") + 1 : -1] for part in parts if part.endswith("]"))
    return ".".join(parts[:-2])


def operation_of(scope: str, root: str = "") -> tuple[str, str]:
    """Module path of a scope in either notation, and the operation that a 2.x scope ends in ("" for none).

    ``"ResNet/Sequential[layer3]/BasicBlock[0]/__iadd___0"`` -> ``("layer3.0", "__iadd___0")``. A scope of NNCF 3 is
    given back as it is. ``root`` is the network's class, which tells that ``"ResNet/flatten_0"`` is a 2.x scope.
    """
    parts = scope.split("/")
    if any("[" in part for part in parts):
        return module_path(scope), "" if parts[-1].endswith("]") else parts[-1]
    if len(parts) == 2 and parts[0] == root and re.search(r"_\d+$", parts[1]):
        return "", parts[1]
    return scope, ""


_untraced: set[tuple[type, str]] = set()


def hide_untraced(model: nn.Module) -> None:
    """Keep NNCF's tracing out of the methods that modules declare in ``untraced``, by ``nncf.torch.disable_tracing``.

    Farthest point sampling alone would put some thousands of nodes into NNCF's graph.
    """
    import nncf.torch

    for kind in {type(module) for module in model.modules()}:
        for name in getattr(kind, "untraced", ()):
            if (kind, name) not in _untraced:
                nncf.torch.disable_tracing(getattr(kind, name))
                _untraced.add((kind, name))


def as_list(value: Any) -> list[Any]:
    """A field that may be absent, one string or a list of them."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def check_levels(entries: Sequence[Section], model: nn.Module, config: Mapping[str, Any]) -> None:
    """Check that the levels and the head of the ``sigmab`` section, if there is one, can be restructured in ``model``.

    After ``depth_pruning`` they are names of a network that does not exist yet; restructuring checks them.

    Raises:
        ConfigError: a name is no module of the model, or the file's own ``ignored_scopes`` leave a level out.
    """
    algorithms = [entry.algorithm for entry in entries]
    if "sigmab" not in algorithms or "depth_pruning" in algorithms[: algorithms.index("sigmab")]:
        return
    section = entries[algorithms.index("sigmab")]
    values: Any = section.config
    names = (*values.levels, values.head)
    missing = _unknown_modules(model, names)
    if missing:
        raise ConfigError(f"{section}: {missing}. Is this config for another model?")
    covered = _covered_levels(model, as_list(config.get("ignored_scopes")), names)
    if covered:
        raise ConfigError(
            f"ignored_scopes cover {', '.join(map(repr, covered))}, which sigmab is to restructure. Scopes at the "
            "top of the file hold for every algorithm; move them into the section that is to ignore the layers."
        )


def _unknown_modules(model: nn.Module, names: Sequence[str]) -> str:
    """What is wrong with ``names`` as modules of ``model``; empty if nothing is."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            children = ", ".join(child for child, _ in model.named_children())
            hint = f"did you mean {', '.join(near)}?" if near else f"its top-level modules are {children}"
            return f"{type(model).__name__} has no module {name!r}; {hint}"
    return ""


def _covered_levels(model: nn.Module, scopes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Those of the modules ``names`` whose weighted layers are all matched by ``scopes`` (NNCF's notation)."""
    covered = []
    modules = dict(model.named_modules())
    for name in names:
        layers = [
            f"{name}.{inner}" if inner else name
            for inner, module in modules[name].named_modules()
            if getattr(module, "weight", None) is not None and module.weight.dim() > 1
        ]
        if layers and all(any(_matches(model, layer, scope) for scope in scopes) for layer in layers):
            covered.append(name)
    return covered


def _matches(model: nn.Module, path: str, scope: str) -> bool:
    if not scope.startswith("{re}"):
        # An operation between layers, such as an addition, covers no layer of its block.
        whole = module_path(scope) if scope.endswith("]") else scope.replace("/", ".")
        return path in (whole, module_path(scope)) or path.startswith(whole + ".")
    pattern = re.compile(scope[len("{re}") :])
    plain, extended = type(model).__name__, type(model).__name__
    module = model
    for part in path.split("."):
        module = module.get_submodule(part)
        kind = type(module).__name__
        plain += f"/{kind}[{part}]"
        extended += f"/{'NNCF' if not list(module.children()) else ''}{kind}[{part}]"
    operation = {"Linear": "linear_0"}.get(type(module).__name__, type(module).__name__.lower() + "_0")
    forms = (f"{plain}/{operation}", f"{extended}/{operation}", path.replace(".", "/") + f"/{operation}")
    return any(pattern.search(form) for form in forms)


# ---------------------------------------------------------------- what a section did, in one line


def tree_line(dense: int, stored: int, active: int, leaves: int) -> str:
    """Parameters of the dense network, and of the tree in all and on its largest path."""
    share = f" ({100 * active / dense:.1f} % of dense)" if dense else ""
    return f"{dense:,} parameters became {stored:,} stored, {active:,} active{share}, {leaves} leaves"


def parameter_line(before: int, after: int) -> str:
    return f"{before:,} parameters before, {after:,} after"
