"""What a runner relies on in a manifest: one tree, regions on pages, tensors that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from ..errors import FormatError
from .manifest import ALIGNMENT, MODALITIES, PAGE, Manifest, Node, TensorEntry, codebook_region

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


def check_manifest(manifest: Manifest) -> None:
    """Whether a runner can rely on it: one tree, regions on pages, tensors that do not overlap.

    Raises:
        FormatError: names the node.
    """
    if manifest.modality not in MODALITIES:
        raise FormatError(f"unknown modality {manifest.modality!r}; known: {', '.join(MODALITIES)}")
    _check_tree(manifest)
    for node in manifest.nodes:
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
        _check_tensors(node, region.tensors, region.used)
        tensors = region.tensors
        if "codebook" in node.extra:
            nbytes, expanded = codebook_region(node)
            _check_tensors(node, expanded, nbytes)
            tensors += expanded
        for tensor in tensors if manifest.format != "openvino" else ():
            if tensor.dtype in _NOT_NUMPYS:
                raise FormatError(
                    f"{node}: tensor {tensor.name!r} has type {tensor.dtype!r}, which format {manifest.format!r} lacks"
                )


def _check_tree(manifest: Manifest) -> None:
    known: dict[str, Node] = {}
    for node in manifest.nodes:
        if node.path in known:
            raise FormatError(f"{node} is listed twice")
        known[node.path] = node
    if "" not in known:
        raise FormatError("the manifest has no root node")
    if not manifest.leaves or len(set(manifest.leaves)) != len(manifest.leaves):
        raise FormatError(f"the manifest's leaves must be different paths; got {list(manifest.leaves)}")
    for leaf in manifest.leaves:
        manifest.path_nodes(leaf)
    reached = {""}
    for node in manifest.nodes:
        if not node.inputs or not node.outputs:
            raise FormatError(f"{node}: it has no inputs or no outputs")
        if (node.role == "leaf") != (node.path in manifest.leaves) or (node.role == "leaf") == bool(
            node.children
        ):
            raise FormatError(
                f"{node}: a leaf, and no other node, is one of leaves and has no children; it is "
                f"{'one' if node.path in manifest.leaves else 'none'} of them and has children {list(node.children)}"
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


def _check_tensors(node: Node, tensors: Sequence[TensorEntry], nbytes: int) -> None:
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
