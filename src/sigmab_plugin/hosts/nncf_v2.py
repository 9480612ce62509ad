"""NNCF 2.x: config files and ``create_compressed_model`` learn the algorithms of the group ``nncf.algorithms``.

:func:`register` adds each technique's schema when NNCF's config schema is first asked for, and its builder when
``nncf.torch`` is imported. It runs by itself when ``nncf`` is imported (see :mod:`.autoload`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from nncf.config import NNCFConfig
from nncf.config import schema as nncf_schema

from .autoload import after_import
from .nncf_schema import SectionError, check, offered_names, techniques

_log = logging.getLogger(__name__)
_MARK = "_sigmab_original"
_added: set[str] = set()


class ConfigFileError(SectionError, jsonschema.ValidationError):  # type: ignore[misc]
    """What ``NNCFConfig.from_json`` raises for a section of ours; its message names the key."""

    def __init__(self, message: str) -> None:
        jsonschema.ValidationError.__init__(self, message)


def register() -> None:
    """Make NNCF accept every installed technique; calling it again changes nothing.

    The techniques themselves are loaded when NNCF first asks for its schema, or builds a model: a process that merely
    imports NNCF does not pay for them.
    """
    if not hasattr(NNCFConfig.schema, _MARK):
        NNCFConfig.schema = staticmethod(_with_techniques(NNCFConfig.schema))
        NNCFConfig.validate = staticmethod(_validating(NNCFConfig.validate))
    after_import("nncf.torch", _register_builders)


def _with_techniques(original: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    def schema() -> dict[str, Any]:
        for name, technique in techniques().items():
            _add_schema(name, technique.config.json_schema())
        return original()

    setattr(schema, _MARK, original)
    return schema


def _add_schema(name: str, schema: dict[str, Any]) -> None:
    known = nncf_schema.REF_VS_ALGO_SCHEMA  # also NNCF_CONFIG_SCHEMA["$defs"]
    if name in _added:
        return
    if name in known:
        _log.warning("NNCF has an algorithm %r of its own; the entry point of that name is left out", name)
        return
    _added.add(name)
    known[name] = schema
    reference = {"$ref": f"#/$defs/{name}"}
    single, several = nncf_schema.NNCF_CONFIG_SCHEMA["properties"]["compression"]["oneOf"]
    # Both forms share one list in every 2.x seen; a second entry would make every section match twice.
    for choices in (single["oneOf"], several["items"]["oneOf"]):
        if reference not in choices:
            choices.append(reference)


def _validating(original: Callable[[Any], None]) -> Callable[[Any], None]:
    def validate(loaded_json: Any) -> None:
        if isinstance(loaded_json, Mapping):
            try:
                check(loaded_json)
            except SectionError as error:
                raise ConfigFileError(str(error)) from None
        original(loaded_json)

    return validate


def _register_builders(_: ModuleType) -> None:
    import_module(f"{__package__}.nncf_v2_builder").register_builders(offered_names())
