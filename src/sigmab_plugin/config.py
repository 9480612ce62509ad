"""Configuration sections: one frozen dataclass per technique.

``to_dict`` / ``from_dict`` are exactly the technique's section in an NNCF-style config file::

    {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "shared_ratio": 0.5}
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, Union

from .errors import ConfigError

C = TypeVar("C", bound="TechniqueConfig")


def option(default: Any, description: str, **bounds: Any) -> Any:
    """A dataclass field with its documentation and its JSON-schema bounds."""
    metadata = {"description": description, **bounds}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TechniqueConfig:
    """Base of all technique sections: JSON round trip, unknown keys and bounds are checked.

    A subclass sets ``algorithm`` and declares its fields with :func:`option`.
    """

    algorithm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = _from_json(self.algorithm, spec.name, getattr(self, spec.name), hints[spec.name])
            object.__setattr__(self, spec.name, value)
            _check_bounds(self.algorithm, spec, getattr(self, spec.name))
        self.validate()

    def validate(self) -> None:
        """Check what one field alone cannot tell. Raises :class:`ConfigError`."""

    def to_dict(self) -> dict[str, Any]:
        """The config-file section, JSON types only."""
        section: dict[str, Any] = {"algorithm": self.algorithm}
        for spec in dataclasses.fields(self):
            section[spec.name] = _to_json(getattr(self, spec.name))
        return section

    @classmethod
    def from_dict(cls: type[C], section: Mapping[str, Any]) -> C:
        """Read a config-file section.

        Raises:
            ConfigError: unknown key (with the nearest known one), wrong type, wrong algorithm.
        """
        values = dict(section)
        algorithm = values.pop("algorithm", cls.algorithm)
        if algorithm != cls.algorithm:
            raise ConfigError(f"this section is for algorithm {algorithm!r}, expected {cls.algorithm!r}")
        known = {spec.name for spec in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" Known keys: {', '.join(sorted(known))}."
                raise ConfigError(f"{cls.algorithm}: unknown key {key!r}.{hint}")
        return cls(**values)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON schema of the section (draft 7 vocabulary, as NNCF's own schemas)."""
        hints = typing.get_type_hints(cls)
        properties: dict[str, Any] = {"algorithm": {"const": cls.algorithm}}
        for spec in dataclasses.fields(cls):
            schema = _schema_of(hints[spec.name])
            schema["description"] = spec.metadata.get("description", "")
            for bound in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum"):
                if bound in spec.metadata:
                    schema[bound] = spec.metadata[bound]
            properties[spec.name] = schema
        return {
            "type": "object",
            "properties": properties,
            "required": ["algorithm"],
            "additionalProperties": False,
        }

    def replace(self: C, **changes: Any) -> C:
        return dataclasses.replace(self, **changes)


def _check_bounds(algorithm: str, spec: dataclasses.Field[Any], value: Any) -> None:
    if value is None:
        return
    meta = spec.metadata
    name = f"{algorithm}: {spec.name}"
    if "enum" in meta and value not in meta["enum"]:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, meta['enum']))}; got {value!r}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite; got {value!r}")
    limits: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
        ("minimum", operator.ge, "at least"),
        ("maximum", operator.le, "at most"),
        ("exclusiveMinimum", operator.gt, "more than"),
        ("exclusiveMaximum", operator.lt, "less than"),
    )
    for key, holds, words in limits:
        if key in meta and not holds(value, meta[key]):
            raise ConfigError(f"{name} must be {words} {meta[key]}; got {value!r}")


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(item) for item in value]
    return value


def _from_json(algorithm: str, key: str, value: Any, hint: Any) -> Any:
    """Convert a JSON value to the declared type; ints pass for floats, lists become tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        for choice in args:
            try:
                return _from_json(algorithm, key, value, choice)
            except ConfigError:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif origin is tuple:
        inner = args[0] if args else Any
        if isinstance(value, str):
            what = "a list of names" if inner is str else "a list"
            raise ConfigError(
                f"{algorithm}: {key} has the wrong type: give {what}, [{value!r}] instead of {value!r}"
            )
        if isinstance(value, Sequence) and inner is str and any(hasattr(v, "named_modules") for v in value):
            raise ConfigError(
                f"{algorithm}: {key} holds modules: give their qualified names, as model.named_modules() has them"
            )
        if isinstance(value, Sequence):
            return tuple(_from_json(algorithm, key, item, inner) for item in value)
    elif origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(value, Mapping):
            return {str(k): _from_json(algorithm, key, item, args[1]) for k, item in value.items()}
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ConfigError(f"{algorithm}: {key} has the wrong type: {json.dumps(value, default=repr)[:80]}")


def _schema_of(hint: Any) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(choice) for choice in args]}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(args[0])}
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {"type": "object", "additionalProperties": _schema_of(args[1])}
    simple = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
    return {"type": simple[hint]} if hint in simple else {}


#: Width of a level: one number for its output groups, or {"output": n, "inner": n, "<layer>": n}.
WidthSpec = int | dict[str, int]


@dataclass(frozen=True)
class SigmaBConfig(TechniqueConfig):
    """SigmaB section (arXiv 2606.09924). Widths count channels; ratios are fractions of channels.

    The tree is binary: ``levels`` names the modules at which it branches, outermost first, and
    ``head`` the module at which the classifier starts.
    """

    algorithm: ClassVar[str] = "sigmab"

    levels: tuple[str, ...] = option((), "modules at which the tree branches, in order of execution")
    head: str = option("", "module at which the leaf head starts, after the last level")
    shared_ratio: float = option(
        0.5, "share of a branch's channels kept in both branches", minimum=0.0, maximum=1.0
    )
    projection_dim: int = option(128, "size D of the latents that are clustered and routed", minimum=1)
    projection_dropout: float = option(0.0, "dropout after the projection", minimum=0.0, exclusiveMaximum=1.0)
    router_temperature: float = option(
        1.0, "router logits are divided by it; argmax is unchanged", exclusiveMinimum=0.0
    )
    widths: dict[str, WidthSpec] = option(
        {}, "channels kept, by level, head or branch path: a number, or {output, inner, <layer>}"
    )
    active_ratio: float | None = option(
        None, "target active / dense parameters; widths are solved for", exclusiveMinimum=0.0, maximum=1.0
    )
    round_to: int | None = option(None, "round widths down to a multiple of it", minimum=1)
    responsibility_weight: float = option(0.3, "lambda of eq. 8", minimum=0.0)
    responsibility_temperature: float = option(0.3, "tau_r of eq. 6", exclusiveMinimum=0.0)
    inner_selection: str = option(
        "norm",
        "inner planes by norm, the same for both branches (the paper's way), or per cluster by activation",
        enum=("norm", "activation"),
    )
    partition: str = option("activation", "how specific channels are chosen", enum=("activation", "random"))
    repair: str = option(
        "none",
        "least_squares: layers that lost inputs are fitted to the dense layers' outputs on their branch's samples",
        enum=("none", "least_squares"),
    )
    repair_samples: int = option(
        1024, "calibration samples for repair at most; their activations are held in memory", minimum=1
    )
    kmeans_restarts: int = option(10, "restarts of spherical k-means", minimum=1)
    kmeans_iterations: int = option(100, "iterations of one restart at most", minimum=1)
    balanced_clusters: bool = option(
        False, "a node's clusters get equally many calibration samples, ties permitting"
    )
    seed: int = option(0, "seed of projections, k-means and random choices", minimum=0)

    def validate(self) -> None:
        if self.active_ratio is not None and self.widths:
            raise ConfigError("sigmab: give widths or active_ratio, not both")
        if len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"sigmab: levels name a module twice: {list(self.levels)}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SigmaBConfig:
        """The published trees: ``"resnet50"`` and ``"pointnet2"`` (``sigmab_plugin.models``).

        PointNet++'s widths are the one layout that fits the published totals; the paper does not
        print them.
        """
        presets: dict[str, dict[str, Any]] = {
            "resnet50": {"levels": ("layer3", "layer4"), "head": "fc"},
            "pointnet2": {
                "levels": ("sa3", "fc1"),
                "head": "head",
                "widths": {"sa3": {"output": 512, "inner": 256}, "fc1": 256, "head": {"inner": 128}},
            },
        }
        if name not in presets:
            raise ConfigError(f"unknown preset {name!r}; known: {', '.join(sorted(presets))}")
        return cls(**{**presets[name], **changes})
