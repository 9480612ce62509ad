"""The manifest of a bundle: plain data, versioned JSON, checked when it is read.

One :class:`Node` per artefact. ``weights`` says where a node's bytes lie: one file, one offset, one
length, so that one seek and one read bring it. See ``docs/bundle-format.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
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

#: Bits per element of a region's types; those of runtimes that NumPy lacks included.
DTYPE_BITS = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2", "f8e4m3", "f8e5m2"), 8),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "i16", "u16", "bf16"), 16),
    **dict.fromkeys(("int32", "uint32", "float32", "u32"), 32),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64", "u64"), 64),
    "complex128": 128,
    **dict.fromkeys(("i4", "u4", "nf4", "f4e2m1"), 4),
    "u1": 1,
}
#: Those that OpenVINO alone has, or torch: only its own format stores them.
_NOT_NUMPYS = frozenset(
    (
        *("float8_e4m3fn", "float8_e5m2", "f8e4m3", "f8e5m2", "bfloat16", "bf16", "i16", "u16", "u32", "u64"),
        *("i4", "u4", "nf4", "f4e2m1", "u1"),
    )
)


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
        """Whether a runner can rely on it: one tree, regions on pages, tensors that do not overlap.

        Raises:
            FormatError: names the node.
        """
        if self.modality not in MODALITIES:
            raise FormatError(f"unknown modality {self.modality!r}; known: {', '.join(MODALITIES)}")
        self._check_tree()
        for node in self.nodes:
            for name in (node.program.file, node.weights.file):
                if Path(name).name != name or name in ("", "..") or "\0" in name:
                    raise FormatError(f"{node}: {name!r} must be a plain file name inside the bundle")
            region = node.weights
            if region.offset % PAGE or region.nbytes % PAGE:
                raise FormatError(f"{node}: its weights are not aligned to {PAGE} bytes")
            if region.offset < 0 or not 0 <= region.used <= region.nbytes:
                raise FormatError(
                    f"{node}: {region.used} of {region.nbytes} bytes at offset {region.offset} are no region"
                )
            if node.parameters < 0 or node.program.nbytes < 0:
                raise FormatError(
                    f"{node}: {node.parameters} parameters and a program of {node.program.nbytes} bytes"
                )
            check_tensors(node, region.tensors, region.used)
            tensors = region.tensors
            if "codebook" in node.extra:
                nbytes, expanded = codebook_region(node)
                check_tensors(node, expanded, nbytes)
                tensors += expanded
            for tensor in tensors if self.format != "openvino" else ():
                if tensor.dtype in _NOT_NUMPYS:
                    raise FormatError(
                        f"{node}: tensor {tensor.name!r} has type {tensor.dtype!r}, which format {self.format!r} lacks"
                    )

    def _check_tree(self) -> None:
        known: dict[str, Node] = {}
        for node in self.nodes:
            if node.path in known:
                raise FormatError(f"{node} is listed twice")
            known[node.path] = node
        if "" not in known:
            raise FormatError("the manifest has no root node")
        if not self.leaves or len(set(self.leaves)) != len(self.leaves):
            raise FormatError(f"the manifest's leaves must be different paths; got {list(self.leaves)}")
        for leaf in self.leaves:
            self.path_nodes(leaf)
        reached = {""}
        for node in self.nodes:
            if not node.inputs or not node.outputs:
                raise FormatError(f"{node}: it has no inputs or no outputs")
            if (node.role == "leaf") != (node.path in self.leaves) or (node.role == "leaf") == bool(
                node.children
            ):
                raise FormatError(
                    f"{node}: a leaf, and no other node, is one of leaves and has no children; it is "
                    f"{'one' if node.path in self.leaves else 'none'} of them and has children {list(node.children)}"
                )
            for values in (node.inputs, node.outputs):
                if len({value.name for value in values}) != len(values):
                    raise FormatError(f"{node}: two of its inputs, or of its outputs, have the same name")
            if len(node.children) > 1 and node.outputs[-1].shape[1:] != (len(node.children),):
                raise FormatError(
                    f"{node}: its router's logits have shape {node.outputs[-1].shape} for {len(node.children)} children"
                )
            handed_on = len(node.outputs) - (len(node.children) > 1)  # router logits come last
            for child in node.children:
                if child not in known:
                    raise FormatError(f"{node} names children that the manifest lacks: {node.children}")
                prefix = f"{node.path}/" if node.path else ""
                if child in reached or not child.startswith(prefix) or "/" in child[len(prefix) :]:
                    raise FormatError(f"{node}: {child!r} is not its child, or is listed twice")
                reached.add(child)
                if len(known[child].inputs) != handed_on:
                    raise FormatError(
                        f"{known[child]} takes {len(known[child].inputs)} inputs, {node} hands on {handed_on}"
                    )
        if reached != known.keys():
            raise FormatError(f"no node leads to {', '.join(map(repr, known.keys() - reached))}")


def check_tensors(node: Node, tensors: Sequence[TensorEntry], nbytes: int) -> None:
    """Whether ``tensors`` lie in ``nbytes`` bytes, on cache lines, apart, as large as type and shape say.

    Raises:
        FormatError: names ``node`` and the tensor.
    """
    end = 0
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        where = f"{node}: tensor {tensor.name!r}"
        if tensor.dtype not in DTYPE_BITS:
            raise FormatError(f"{where} has unknown type {tensor.dtype!r}")
        if min(tensor.shape, default=0) < 0:
            raise FormatError(f"{where} has shape {tensor.shape}")
        size = -(-prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8)
        if tensor.nbytes < 0 or tensor.offset < 0 or tensor.offset + tensor.nbytes > nbytes:
            raise FormatError(f"{where} lies outside its region")
        if tensor.nbytes != size:
            raise FormatError(
                f"{where} has {tensor.nbytes} bytes; {tensor.dtype} of shape {tensor.shape} has {size}"
            )
        if tensor.offset % ALIGNMENT:
            raise FormatError(f"{where} is not aligned to {ALIGNMENT} bytes")
        if tensor.offset < end:
            raise FormatError(f"{where} overlaps another")
        end = tensor.offset + tensor.nbytes
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise FormatError(f"{node}: two of its tensors have the same name")


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
