"""Scopes of a config file, in 2.x or 3.x notation, as names of the operations of one part."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .nncf_schema import Section, SectionError, as_list, operation_of
from .nncf_v3_parts import Part, is_wrapped, parts, wrap_parts

_log = logging.getLogger(__name__)

#: Operators by their names in 2.x scopes, where function hooks see another one.
_OPERATORS = {
    **{plain: plain for plain in ("add", "sub", "mul", "matmul", "pow", "neg")},
    **{f"r{plain}": plain for plain in ("add", "mul", "matmul")},
    **{f"i{plain}": f"{plain}_" for plain in ("add", "sub", "mul")},
    "truediv": "div",
    "itruediv": "div_",
}


@dataclass(frozen=True)
class Scope:
    """One scope of the file; ``root`` is the class of the network that 2.x scopes start with."""

    text: str
    root: str

    def among(self, names: Iterable[str], module: nn.Module) -> set[str]:
        """Those operations ``names`` of ``module`` that the scope covers.

        A part is handled by itself and layers keep their qualified names in it, so that a scope holds from the first
        letter on. A 2.x scope that ends in an operation covers that one, or the whole layer where the operation goes by
        another name here.
        """
        if self.text.startswith("{re}"):
            try:
                expression = re.compile(self._expression())
            except re.error as error:
                raise SectionError(f"{self.text!r} is no regular expression: {error}") from error
            return {name for name in names if expression.search(name)}
        path, operation = operation_of(self.text, self.root)
        path = path.replace(".", "/")
        if operation:
            exact = {f"{path}/{name}" for name in _operator_names(operation)}.intersection(names)
            if exact or not _is_layer(module, path):
                return exact
        expression = re.compile(f"^{re.escape(path)}(/|$)")
        return {name for name in names if expression.search(name)}

    def _expression(self) -> str:
        """The regular expression over 3.x names.

        2.x scopes name the class of every module (``Sequential[layer3]``), name operators as Python does, and join an
        operation and its number by an underscore.
        """
        text = re.sub(rf"^\^?{re.escape(self.root)}/", "^", self.text[len("{re}") :])
        text = re.sub(r"^\^?\w+/(?=\w+\\\[)", "^", text)
        text = re.sub(r"\w*\\\[([\w.]+)\\?\]", r"\1", text)
        text = re.sub(r"__[a-z]+__", lambda found: f"(?:{'|'.join(sorted(_operators(found[0])))})", text)
        return re.sub(r"_(?=(\d+|\[[\d-]+\]|\\d[+*]?|\.\*)\$?$)", "[_/]", text)


def _operator_names(operation: str) -> set[str]:
    """``"__iadd___0"`` -> ``{"__iadd__/0", "add_/0"}``: 2.x's name and number, as 3.x may write them."""
    name, _, number = operation.rpartition("_")
    return {f"{form}/{number}" for form in _operators(name)}


def _operators(name: str) -> set[str]:
    """``"__iadd__"`` -> ``{"__iadd__", "add_"}``."""
    if not (name.startswith("__") and name.endswith("__")):
        return {name}
    plain = name.strip("_")
    return {name, _OPERATORS[plain]} if plain in _OPERATORS else {name}


def _is_layer(module: nn.Module, path: str) -> bool:
    """Whether ``path`` is a module without children: its one operation goes by its name."""
    found = dict(module.named_modules()).get(path.replace("/", "."))
    return bool(path) and found is not None and not any(True for _ in found.children())


def layers_of(operations: Iterable[str], module: nn.Module) -> list[nn.Module]:
    """The layers whose operations these are; an operation between layers belongs to none."""
    known = dict(module.named_modules())
    paths = {".".join(name.split("/")[:-2]) for name in operations if name.count("/") > 1}
    return [known[path] for path in sorted(paths) if path in known and _is_layer(module, path)]


@dataclass
class SectionScopes:
    """The scopes that one section reads, and which of them have been seen to cover something.

    Attributes:
        ignored, targets: ``ignored_scopes`` of the file and of the section, ``target_scopes`` of the section.
    """

    entry: Section
    shared: Sequence[str]
    root: str
    matched: set[str] = field(default_factory=set)

    @property
    def ignored(self) -> list[Scope]:
        own = as_list(self.entry.values.get("ignored_scopes"))
        return [Scope(text, self.root) for text in (*self.shared, *own)]

    @property
    def targets(self) -> list[Scope]:
        if self.entry.algorithm == "quantization":  # reported: nncf.quantize has nothing of the kind
            return []
        return [Scope(text, self.root) for text in as_list(self.entry.values.get("target_scopes"))]

    def __bool__(self) -> bool:
        return bool(self.ignored or self.targets)

    def left_out(self, part: Part) -> set[str]:
        """Operations of ``part`` that the section must not change."""
        if not self:
            return set()
        names = operation_names(part)
        ignored = self._covered(self.ignored, names, part.module)
        if self.targets:
            targeted = self._covered(self.targets, names, part.module)
            # not the weights themselves, which are nodes too ("layer4.0.conv1.weight") and follow their layer
            ignored |= {name for name in names if "/" in name} - targeted
        return ignored

    def _covered(self, scopes: Sequence[Scope], names: Sequence[str], module: nn.Module) -> set[str]:
        found: set[str] = set()
        for scope in scopes:
            covered = scope.among(names, module)
            if covered:
                self.matched.add(scope.text)
            found |= covered
        return found

    def ignored_scope(self, part: Part) -> Any:
        """``nncf.IgnoredScope`` for one part; None where it has nothing to ignore."""
        import nncf

        names = sorted(self.left_out(part))
        return nncf.IgnoredScope(names=names, validate=False) if names else None

    def missing(self) -> list[str]:
        """Scopes that have covered nothing so far, unless ``validate_scopes`` is false."""
        if not self.entry.values.get("validate_scopes", True):
            return []
        every = (scope.text for scope in (*self.ignored, *self.targets))
        return [text for text in dict.fromkeys(every) if text not in self.matched]

    def check(self, gone: Iterable[str] = ()) -> None:
        """Raise where a scope has covered nothing; those in ``gone`` had, before the network was restructured.

        Raises:
            SectionError: a scope names nothing in the network.
        """
        gone = set(gone)
        missing = self.missing()
        lost = [text for text in missing if text in gone]
        if lost:
            _log.warning("%s: %s: nothing of that name is left", self.entry, ", ".join(map(repr, lost)))
        unknown = [text for text in missing if text not in gone]
        if unknown:
            raise SectionError(
                f"{self.entry}: {', '.join(map(repr, unknown))} in ignored_scopes or target_scopes: nothing in the "
                'network has such a name. A scope is a name of NNCF 3 ("layer3/0/conv2/conv2d/0", "layer3"), a 2.x '
                'scope or "{re}" and an expression; "validate_scopes": false lets it pass.'
            )


def check_scopes(
    network: nn.Module, readers: Sequence[SectionScopes], example: tuple[Any, ...], restructured_from: int
) -> set[str]:
    """Look for the scopes in ``network`` before anything runs; returns those that are found.

    Args:
        restructured_from: position of the first section that may give the network other names; what later sections
            name may not be there yet.

    Raises:
        SectionError: a scope of an earlier section names nothing.
    """
    reading = [reader for reader in readers if reader]
    if not reading:
        return set()
    for part in parts(wrap_parts(network), [example], per_leaf=False):
        names = operation_names(part)
        for reader in reading:
            reader._covered([*reader.ignored, *reader.targets], names, part.module)
    for reader in reading:
        if reader.entry.position < restructured_from:
            reader.check()
    return set().union(*(reader.matched for reader in reading))


def operation_names(part: Part) -> list[str]:
    """Names of the nodes of NNCF's graph of the part's module."""
    from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
    from nncf.torch.function_hook.wrapper import wrap_model

    example = part.example if isinstance(part.example, tuple) else (part.example,)
    module = part.module if is_wrapped(part.module) else wrap_model(copy.deepcopy(part.module))
    return [node.node_name for node in build_nncf_graph(module, example).get_all_nodes()]
