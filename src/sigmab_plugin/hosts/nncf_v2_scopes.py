"""Scopes of the dense network in an NNCF 2.x config, rewritten for the network that a technique has built."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

from nncf import NNCFConfig

from ..config import SigmaBConfig
from ..tree.net import SigmaBNet
from .nncf_schema import as_list

#: Functions that stand in the net's own forward (pooling, mixing of leaves) rather than in a layer. Quantizers are
#: addressed by scope and order of calls, and these are called in another order in hard routing.
_ROOT_FUNCTIONS = r"{re}^[^/\[\]]+/[^/\[\]]+$"
#: A router is one or two per cent of a path's weights and decides where every sample goes: it keeps them all.
_ROUTERS = r"{re}ModuleDict\[routers\]"
_ADDED_SCOPES = {
    "quantization": (_ROOT_FUNCTIONS,),
    "magnitude_sparsity": (_ROUTERS,),
    "rb_sparsity": (_ROUTERS,),
    "const_sparsity": (_ROUTERS,),
    "filter_pruning": (_ROUTERS,),
}

#: Where the dense network's own names begin: inside the backbone or a branch of a tree, or, where the result is no
#: tree, right behind the name of its class. Anchored: a name at the top must not match the same name further down.
_START = (
    r"^[^/]+/(?:[^/\[]+\[backbone\]/|ModuleDict\[(?:specializers|heads)\]/[^/]+/"
    r"|(?![^/\[]+\[backbone\]/|ModuleDict\[(?:specializers|heads|routers|pools)\]/))"
)
#: The class of the dense network, as it opens a regular expression or one of its alternatives.
_CLASS = re.compile(r"(?P<before>^|(?<!\\)\((?:\?:)?|(?<!\\)\|)\^?(?P<name>\w+)/")


def config_for_new_network(config: NNCFConfig, split: int, *, tree: bool = False) -> NNCFConfig:
    """``config`` with dense scopes rewritten so that they match inside the restructured network too.

    Args:
        split: the number of sections up to the last technique.
        tree: the model was a SigmaB net before the first section.
    """
    rewritten = NNCFConfig(_rewrite_scopes(deepcopy(dict(config))))
    rewritten.register_extra_structs(config.get_all_extra_structs())
    value = rewritten["compression"]
    entries = [value] if isinstance(value, dict) else value
    if tree or any(entry["algorithm"] == SigmaBConfig.algorithm for entry in entries[:split]):
        for entry in entries[split:]:
            added = _ADDED_SCOPES.get(entry["algorithm"], ())
            entry["ignored_scopes"] = [*as_list(entry.get("ignored_scopes")), *added]
    return rewritten


def _rewrite_scopes(value: Any, key: str = "") -> Any:
    if key == "scope_overrides":  # {"weights": {scope: changes}, "activations": {scope: changes}}
        return {
            group: {scope_in_tree(scope): changes for scope, changes in scopes.items()}
            for group, scopes in value.items()
        }
    if isinstance(value, dict):
        return {name: _rewrite_scopes(item, name) for name, item in value.items()}
    if key in ("ignored_scopes", "target_scopes"):
        return [scope_in_tree(scope) for scope in as_list(value)]
    if isinstance(value, list):
        return [_rewrite_scopes(item) for item in value]
    return value


def scope_in_tree(scope: str) -> str:
    """A scope of the dense network, rewritten to match wherever the layer stands in the restructured one.

    ``"ResNet/Sequential[layer3]/NNCFConv2d[0]/conv2d_0"`` becomes a regular expression that matches the same layer
    in every branch. Layers keep their qualified names inside a segment. A scope of the tree itself
    (``"SigmaBNet/..."``) stays as it is.
    """
    if not scope.startswith("{re}"):
        name, _, rest = scope.partition("/")
        if not rest or name == SigmaBNet.__name__:
            return scope
        # The comment shows the user's own words where NNCF reports a scope that matches nothing.
        comment = f"(?#{scope})" if ")" not in scope else ""
        return "{re}" + comment + _START + "/".join(_segment(part) for part in rest.split("/")) + "$"
    return "{re}" + _CLASS.sub(_from_start, scope[len("{re}") :])


def _from_start(match: re.Match[str]) -> str:
    return match["before"] + _START if match["name"] != SigmaBNet.__name__ else match[0]


def _segment(part: str) -> str:
    """A container that a cut goes through is a plain ``Module`` in the parts, so its name alone is compared."""
    container = re.fullmatch(r"(?!NNCF)\w+(\[.+\])", part)
    return r"\w+" + re.escape(container[1]) if container else re.escape(part)
