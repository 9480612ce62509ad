"""Writing bundles: one artefact per node, a manifest, all or nothing."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..modes import evaluating
from . import codebooks
from .manifest import FileEntry, Manifest, Node, Region, Value
from .nodes import NodeSource, chain, check_net, cut
from .writing import BundleWriter, RawTensor, atomic_directory, write_manifest

if TYPE_CHECKING:
    from ..techniques.legonet import PackedModel

_log = logging.getLogger(__name__)

#: Bundle format -> module with ``export_artefact``.
FORMATS = {
    "onnx": ".formats.onnx",
    "openvino": ".formats.openvino",
    "torch": ".formats.torch",
    "executorch": ".formats.executorch",
}
LAYOUTS = ("portable", "native")
PRECISIONS = ("fp32", "fp16", "int8", "int8-weights", "int4-weights", "legonet")


@dataclass(frozen=True)
class Artefact:
    """What a format makes of a node. ``companions`` are further files, written once the region is known."""

    program: bytes
    suffix: str
    tensors: Sequence[RawTensor]
    companions: Callable[[Region], dict[str, bytes]] | None = None


@dataclass(frozen=True)
class Options:
    """How to export; see :func:`export`."""

    format: str
    precision: str
    layout: str
    modality: str
    calibration: dict[str, list[tuple[Any, ...]]] | None = None
    backbone: bool = True
    codebook: PackedModel | None = None


def export(
    net: Any,
    example_inputs: Any,
    directory: str | Path,
    *,
    format: str = "onnx",  # noqa: A002 - the field's word
    precision: str = "fp32",
    layout: str = "portable",
    calibration_data: Any = None,
    codebook: PackedModel | None = None,
    backbone: bool = True,
    packed: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write ``net`` as a bundle, the split form: the backbone, and one artefact per inner node and leaf.

    Args:
        net: a SigmaB net; it is left as it was.
        example_inputs: a batch, or a tuple of positional arguments. The batch size stays free.
        directory: appears whole or not at all.
        format: "onnx", "openvino", "torch" or "executorch".
        precision: "fp32"; "fp16" stores weights in 16 bits; "int8-weights" and "int4-weights" store them as
            integers with a scale per output channel (or block); all three compute in float32. "int8"
            quantizes activations too and needs ``calibration_data``. ONNX only, but for "fp32" and "fp16".
            "legonet" stores indices into a codebook and expands a node when it is loaded (not ExecuTorch).
        layout: "portable", or "native": optimised for this machine and refused on others (ONNX only).
        calibration_data: for "int8": a list of batches of inputs, without targets; each leaf is calibrated with
            the samples routed to it.
        codebook: for "legonet": the packed weights that ``net`` was expanded from; by default those that
            packing left with it.
        backbone: False leaves the backbone out, for one that the format cannot express (farthest point
            sampling, say); the runner is then given a function that computes it.
        packed: one file for all weights instead of one per node.
        overwrite: replace a bundle that exists.

    Returns:
        The manifest as written.

    Raises:
        ConfigError: options that do not go together.
        ModelError: ``net`` is no SigmaB net, or a node cannot run or be exported; the message names it and why.
        FormatError: ``directory`` exists and is no bundle, or is one and ``overwrite`` is off.
        MissingDependencyError: the format's library is not installed.
    """
    check_net(net)
    for given, name, wanted in (
        (calibration_data, "calibration_data", "int8"),
        (codebook, "codebook", "legonet"),
    ):
        if given is not None and precision != wanted:
            raise ConfigError(
                f"{name} is for precision={wanted!r}; got precision={precision!r}: leave it out"
            )
    with evaluating(net):
        sources = cut(net, example_inputs, backbone=backbone)
        _check_float32(sources, precision)
        calibration = None
        if precision == "int8":
            if calibration_data is None:
                raise ConfigError("precision='int8' needs calibration_data: batches of real inputs")
            from .quantization import collect

            if not backbone:
                raise ConfigError("precision='int8' calibrates from the inputs on: export with the backbone")
            calibration = collect(sources, calibration_data, net.modality.name)
        options = replace(
            _options(format, precision, layout, net.modality.name, calibration),
            backbone=backbone,
            codebook=codebooks.check(net, codebook) if precision == "legonet" else None,
        )
        plan = net.plan.to_dict() if net.plan is not None else None
        return write_bundle(
            sources, tuple(net.leaves), plan, options, directory, packed=packed, overwrite=overwrite
        )


def export_chain(
    modules: Sequence[nn.Module],
    example_inputs: Any,
    directory: str | Path,
    *,
    format: str = "onnx",  # noqa: A002 - the field's word
    precision: str = "fp32",
    layout: str = "portable",
    packed: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Write an unbranched network (a dense network or a static twin) as a bundle that the same runner runs.

    ``modules`` are its consecutive parts, run one after the other; with one part, the whole network is one
    artefact. Other arguments and errors: see :func:`export`.
    """
    if precision in ("int8", "legonet"):
        raise ConfigError(
            f"precision={precision!r} is for SigmaB nets; use fp32, fp16, int8-weights or int4-weights"
        )
    with evaluating(*modules):
        sources = chain(modules, example_inputs)
        _check_float32(sources, precision)
        options = _options(format, precision, layout, "images", None)
        leaves = (sources[-1].path,)
        return write_bundle(sources, leaves, None, options, directory, packed=packed, overwrite=overwrite)


def _options(form: str, precision: str, layout: str, modality: str, calibration: Any) -> Options:
    for name, value, known in (
        ("format", form, tuple(FORMATS)),
        ("precision", precision, PRECISIONS),
        ("layout", layout, LAYOUTS),
    ):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if layout == "native" and form != "onnx":
        raise ConfigError(f"layout='native' is for format='onnx'; {form!r} bundles are portable")
    if precision == "legonet":
        if form == "executorch":
            raise ConfigError(
                "precision='legonet' is for onnx, torch and openvino: ExecuTorch programs hold weights"
            )
        if layout == "native":
            raise ConfigError("precision='legonet' stores blocks of whole rows: use layout='portable'")
    elif precision not in ("fp32", "fp16") and form != "onnx":
        raise ConfigError(f"precision={precision!r} is for format='onnx'; {form!r} takes fp32 or fp16")
    if layout == "native" and precision in ("int8-weights", "int4-weights"):
        raise ConfigError(
            f"precision={precision!r} scales whole channels, which layout='native' cuts up: use 'portable'"
        )
    return Options(form, precision, layout, modality, calibration)


def _check_float32(sources: Sequence[NodeSource], precision: str) -> None:
    """What stores weights in fewer bits starts from float32; others would stay as they are without a word.

    Raises:
        ModelError: names the node and the parameter.
    """
    if precision == "fp32":
        return
    for source in sources:
        for name, value in source.module.named_parameters():
            if value.is_floating_point() and value.dtype != torch.float32:
                raise ModelError(
                    f"{source}: {name} is {str(value.dtype).removeprefix('torch.')}, and precision={precision!r} "
                    "starts from float32: call .float() on the network first"
                )


def write_bundle(
    sources: Sequence[NodeSource],
    leaves: tuple[str, ...],
    plan: dict[str, Any] | None,
    options: Options,
    directory: str | Path,
    *,
    packed: bool = False,
    overwrite: bool = False,
    exporter: Any = None,
) -> Manifest:
    """Write one artefact per source. ``exporter`` stands in for the format's own module (same functions)."""
    exporter = exporter or import_module(FORMATS[options.format], __package__)
    nodes: list[Node] = []
    digits = max(2, len(str(len(sources) - 1)))
    with atomic_directory(Path(directory), overwrite=overwrite) as work:
        writer = BundleWriter(work, packed=packed)
        for index, source in enumerate(sources):
            artefact: Artefact = exporter.export_artefact(source, options)
            stem = f"{index:0{digits}d}_{source.key}"
            tensors, extra = artefact.tensors, {}
            if options.codebook is not None:
                tensors, extra["codebook"] = codebooks.encode(source, tensors, options.codebook)
            region = writer.weights(stem, tensors)
            program = writer.file(f"{stem}{artefact.suffix}", artefact.program)
            companions: dict[str, FileEntry] = {}
            if artefact.companions is not None and not extra:  # they name tensors in the region
                for suffix, data in artefact.companions(region).items():
                    companions[suffix.strip(".")] = writer.file(f"{stem}{suffix}", data)
            if companions:
                extra["files"] = {k: [e.file, e.nbytes, e.sha256] for k, e in companions.items()}
            nodes.append(_node(source, options, program, region, extra))
            _log.info("%s: %d bytes of weights in %s", source, region.nbytes, region.file)
        manifest = Manifest(
            format=options.format,
            precision=options.precision,
            layout=options.layout,
            modality=options.modality,
            nodes=tuple(nodes),
            leaves=leaves,
            plan=plan,
            requires={**exporter.requires(options), **({} if options.backbone else {"backbone": True})},
            producer=_producer(exporter.LIBRARIES),
        )
        manifest.check()
        write_manifest(work, manifest.to_dict())
    return manifest


def _node(
    source: NodeSource, options: Options, program: FileEntry, region: Region, extra: dict[str, Any]
) -> Node:
    def values(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Value, ...]:
        return tuple(
            Value(name, str(t.dtype).removeprefix("torch."), (None, *t.shape[1:]))
            for name, t in zip(names, tensors, strict=True)
        )

    return Node(
        path=source.path,
        key=source.key,
        role=source.role,
        children=source.children,
        inputs=values(source.inputs, source.example),
        outputs=values(source.outputs, source.output_example),
        program=program,
        weights=region,
        parameters=source.parameters,
        extra=extra,
    )


def _producer(libraries: Sequence[str]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("sigmab-plugin", "torch", *libraries):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
