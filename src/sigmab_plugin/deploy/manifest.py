"""The manifest of a bundle: plain data, versioned JSON, checked when it is read.

One :class:`Node` per artefact. ``weights`` says where a node's bytes lie: one file, one offset, one
length, so that one seek and one read bring it. See ``docs/bundle-format.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError

FORMAT = "sigmab-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

#: Weight regions start and end on a page, so that they can be read past the page cache or mapped.
PAGE = 4096
#: Tensors inside a region start on a cache line.
ALIGNMENT = 64

#: How samples are taken out of a batch; see :mod:`sigmab_plugin.tree.modality`.
MODALITIES = ("vectors", "images", "tokens", "channels_last", "points")


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Value:
    """An input or output of a node. ``None`` in ``shape`` is a size that may vary (the batch)."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor inside a weight region; ``offset`` counts from the start of the region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class FileEntry:
    """A whole file, relative to the bundle's directory."""

    file: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Region:
    """A node's weights: ``nbytes`` bytes at ``offset`` of ``file``, both multiples of the page.

    ``used`` is the part that holds tensors; the rest is zero padding, covered by ``sha256`` too.
    """

    file: str
    offset: int
    nbytes: int
    used: int
    sha256: str
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Node:
    """One artefact. ``path`` is "" for the root, "0/1" for a leaf; ``role`` backbone, inner or leaf.

    An inner artefact (and the backbone) returns its frontier and, last, the router's logits over
    ``children``; with one child there is nothing to choose and no logits. A leaf returns the logits.
    """

    path: str
    key: str
    role: str
    children: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    program: FileEntry
    weights: Region
    parameters: int
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"node {self.path or 'root'!r}"

    @property
    def memory_bytes(self) -> int:
        """Bytes in memory at most while the node is loaded: the region, and what a codebook expands it to."""
        return self.weights.nbytes + (codebook_region(self)[0] if "codebook" in self.extra else 0)


@dataclass(frozen=True)
class Manifest:
    """Everything a runner needs besides the files named in it."""

    format: str
    precision: str
    layout: str
    modality: str
    nodes: tuple[Node, ...]
    leaves: tuple[str, ...]
    plan: dict[str, Any] | None = None
    requires: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, str] = field(default_factory=dict)

    def node(self, path: str) -> Node:
        for node in self.nodes:
            if node.path == path:
                return node
        raise FormatError(f"the manifest has no node {path!r}; it has {[n.path for n in self.nodes]}")

    def path_nodes(self, leaf: str) -> tuple[Node, ...]:
        """The nodes from the root to ``leaf``, in order of use."""
        parts = leaf.split("/") if leaf else []
        return tuple(self.node("/".join(parts[:depth])) for depth in range(len(parts) + 1))

    def path_bytes(self) -> dict[str, int]:
        """Weight bytes of each path, page padding included."""
        return {leaf: sum(node.weights.nbytes for node in self.path_nodes(leaf)) for leaf in self.leaves}

    def path_parameters(self) -> dict[str, int]:
        """Parameters of each path as counted on the network before export."""
        return {leaf: sum(node.parameters for node in self.path_nodes(leaf)) for leaf in self.leaves}

    def to_dict(self) -> dict[str, Any]:
        body = asdict(self)
        body["nodes"] = [_node_to_dict(node) for node in self.nodes]
        paths = {
            leaf: {
                "leaf": index,
                "nodes": [n.path for n in self.path_nodes(leaf)],
                "nbytes": self.path_bytes()[leaf],
            }
            for index, leaf in enumerate(self.leaves)
        }
        head = {"type": FORMAT, "version": FORMAT_VERSION, "page": PAGE, "alignment": ALIGNMENT}
        return {**head, **body, "paths": paths}

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Manifest:
        """Read a manifest.

        Raises:
            FormatError: not a manifest, written by a newer version, or a field is missing or wrong.
        """
        if body.get("type") != FORMAT:
            raise FormatError(f"not a {FORMAT} manifest (type is {body.get('type')!r})")
        version = body.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise FormatError(f"{version!r} is no bundle format version: export the bundle again")
        if version > FORMAT_VERSION:
            raise FormatError(
                f"bundle format version {version!r} is newer than the {FORMAT_VERSION} this package reads: "
                "upgrade sigmab-plugin or export the bundle again"
            )
        if (body.get("page", PAGE), body.get("alignment", ALIGNMENT)) != (PAGE, ALIGNMENT):
            raise FormatError(
                f"pages of {body.get('page')!r} and tensors on {body.get('alignment')!r} bytes: this package reads "
                f"{PAGE} and {ALIGNMENT}"
            )
        try:
            manifest = cls(
                format=str(body["format"]),
                precision=str(body["precision"]),
                layout=str(body["layout"]),
                modality=str(body["modality"]),
                nodes=tuple(_node_from_dict(node) for node in body["nodes"]),
                leaves=tuple(str(leaf) for leaf in body["leaves"]),
                plan=body.get("plan"),
                requires=dict(body.get("requires", {})),
                producer=dict(body.get("producer", {})),
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(
                f"the manifest is incomplete or altered ({error!r}): export the bundle again"
            ) from error
        manifest.check()
        return manifest

    def check(self) -> None:
        """Whether a runner can rely on it.

        Raises:
            FormatError: names the node.
        """
        from .manifest_checks import check_manifest  # which is about the types of this module

        check_manifest(self)


def codebook_region(node: Node) -> tuple[int, tuple[TensorEntry, ...]]:
    """Bytes and tensors of the region that a node's codebook expands to.

    Raises:
        FormatError: the description is incomplete or altered.
    """
    try:
        described: Mapping[str, Any] = node.extra["codebook"]
        nbytes, tensors = _whole(described["nbytes"]), _tensor_entries(described["tensors"])
        if nbytes < 0 or nbytes % PAGE or _whole(described["block_size"]) < 1:
            raise ValueError(f"{nbytes} bytes of blocks of {described['block_size']}")
        if unknown := set(described["packed"]) - {tensor.name for tensor in tensors}:
            raise ValueError(f"no tensors {sorted(unknown)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{node}: its codebook's description is altered ({error!r}): export again"
        ) from error
    return nbytes, tensors


def _whole(value: Any) -> int:
    """JSON writes whole numbers as such; 4096.7, Infinity and true are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _node_to_dict(node: Node) -> dict[str, Any]:
    body = asdict(node)
    body["weights"]["tensors"] = [
        [t.name, t.dtype, list(t.shape), t.offset, t.nbytes] for t in node.weights.tensors
    ]
    return body


def _node_from_dict(body: Mapping[str, Any]) -> Node:
    weights = body["weights"]
    return Node(
        path=str(body["path"]),
        key=str(body["key"]),
        role=str(body["role"]),
        children=tuple(str(child) for child in body["children"]),
        inputs=tuple(_value(v) for v in body["inputs"]),
        outputs=tuple(_value(v) for v in body["outputs"]),
        program=FileEntry(
            str(body["program"]["file"]), _whole(body["program"]["nbytes"]), str(body["program"]["sha256"])
        ),
        weights=Region(
            file=str(weights["file"]),
            offset=_whole(weights["offset"]),
            nbytes=_whole(weights["nbytes"]),
            used=_whole(weights["used"]),
            sha256=str(weights["sha256"]),
            tensors=_tensor_entries(weights["tensors"]),
        ),
        parameters=_whole(body["parameters"]),
        extra=dict(body.get("extra", {})),
    )


def _tensor_entries(rows: Iterable[Any]) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(str(name), str(dtype), tuple(_whole(n) for n in shape), _whole(offset), _whole(nbytes))
        for name, dtype, shape, offset, nbytes in rows
    )


def _value(body: Mapping[str, Any]) -> Value:
    return Value(
        str(body["name"]), str(body["dtype"]), tuple(None if n is None else _whole(n) for n in body["shape"])
    )


def read_manifest(directory: str | Path) -> Manifest:
    """Read ``manifest.json`` of a bundle. Raises :class:`FormatError` if it is missing or broken."""
    file = Path(directory) / MANIFEST_NAME
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(
            f"{directory} is not a bundle: cannot read {MANIFEST_NAME} ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}): export the bundle again") from error
    if not isinstance(body, dict):
        raise FormatError(f"{file} is not a {FORMAT} manifest")
    return Manifest.from_dict(body)
