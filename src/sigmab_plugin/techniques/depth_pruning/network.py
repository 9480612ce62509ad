"""The auxiliary head and the network that it closes (arXiv 2204.10546, section 3)."""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...errors import ConfigError, FormatError, ModelError
from ..checksum import crc32
from .cuts import TracedModel, kept_part, trace

#: Name of the auxiliary head in a :class:`DepthPrunedNet`.
HEAD = "auxiliary_head"
#: What :func:`save_depth_pruned` calls its files.
FORMAT = "sigmab_plugin.depth_pruning"
VERSION = 2


class AuxiliaryHead(nn.Module):
    """Separable stages, global average pooling, classifier: (B, C, H, W) -> (B, classes).

    A stage is depthwise 3x3, BatchNorm, ReLU, 1x1 convolution, BatchNorm, ReLU; with two stages of 32
    and 16 channels on 64 channels and two classes it has 4 178 parameters, running statistics included.

    Args:
        in_channels: channels of the feature map.
        num_classes: outputs.
        widths: output channels of the stages, in order; none: pooling and the classifier alone, which
            is depth pruning without an auxiliary network.
    """

    def __init__(self, in_channels: int, num_classes: int, *, widths: Sequence[int] = (32, 16)) -> None:
        super().__init__()
        if min(in_channels, num_classes, *widths) < 1:
            raise ModelError(
                f"AuxiliaryHead needs positive sizes; got {in_channels} channels, {num_classes} classes, "
                f"widths {list(widths)}"
            )
        self.widths = tuple(widths)
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for index, width in enumerate(widths, start=1):
            stages[f"stage{index}"] = nn.Sequential(
                OrderedDict(
                    dw_conv=nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                    dw_bn=nn.BatchNorm2d(channels),
                    dw_relu=nn.ReLU(),
                    pw_conv=nn.Conv2d(channels, width, 1),
                    pw_bn=nn.BatchNorm2d(width),
                    pw_relu=nn.ReLU(),
                )
            )
            channels = width
        self.stages = nn.Sequential(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.flatten(self.pool(self.stages(feature))))
        return logits


class DepthPrunedNet(fx.GraphModule):
    """The layers that were kept, under the dense model's names, then ``auxiliary_head``: inputs -> (B, classes).

    It takes the dense model's inputs. Build it with :func:`depth_prune`.
    """

    @classmethod
    def assemble(cls, kept: fx.GraphModule, head: AuxiliaryHead, cut: str, *, freeze: bool) -> DepthPrunedNet:
        """Close ``kept`` with ``head``; both become part of the result."""
        graph = fx.Graph()
        feature = graph.graph_copy(kept.graph, {})
        graph.output(graph.call_module(HEAD, (feature,)))
        kept.add_submodule(HEAD, head)
        net = cls(kept, graph, cls.__name__)
        net.meta["depth_pruning"] = {
            "cut": cut,
            "freeze": freeze,
            "fixed": frozenset(name for name, p in net.named_parameters() if not p.requires_grad),
            "shapes": _shapes(net),
        }
        net.freeze(freeze)
        return net

    @property
    def cut(self) -> str:
        """The last layer that was kept."""
        return str(self.meta["depth_pruning"]["cut"])

    @property
    def frozen(self) -> bool:
        """The kept layers ask for no gradient and stay in eval mode, statistics included."""
        return bool(self.meta["depth_pruning"]["freeze"])

    @property
    def head(self) -> AuxiliaryHead:
        head = self.get_submodule(HEAD)
        assert isinstance(head, AuxiliaryHead)
        return head

    def freeze(self, kept: bool = True) -> None:
        """Freeze the kept layers, or let those of their parameters train that the dense model did not freeze."""
        record = self.meta["depth_pruning"]
        record["freeze"] = kept
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(f"{HEAD}.") or not (kept or name in record["fixed"]))
        self.train(self.training)

    def train(self, mode: bool = True) -> DepthPrunedNet:
        super().train(mode)
        if self.frozen:
            for name, module in self.named_children():
                if name != HEAD:
                    module.eval()
        return self

    def kept(self) -> fx.GraphModule:
        """The kept layers alone, inputs -> feature map; it shares the modules of this network."""
        graph = fx.Graph()
        logits = graph.graph_copy(self.graph, {})
        assert isinstance(logits, fx.Node)  # assemble() ends with the call of the head
        graph.output(logits.args[0])
        graph.erase_node(logits)
        return fx.GraphModule(self, graph, "Kept")


def depth_prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    cut: str,
    head_widths: Sequence[int] = (32, 16),
    num_classes: int | None = None,
    freeze: bool = True,
    seed: int = 0,
    traced: TracedModel | None = None,
) -> DepthPrunedNet:
    """Keep ``model`` up to ``cut``, drop the rest, and attach an untrained auxiliary head.

    Args:
        model: left as it was; the result holds copies.
        example_inputs: one batch; a bare tensor is one input, a tuple is splatted.
        cut: a name that :func:`enumerate_cuts` lists.
        num_classes: outputs; as many as the model has, where not given: C of (B, C) or (B, C, 1, 1).
        freeze: the kept layers do not train.
        seed: seed of the head's weights; the global generator is left alone.
        traced: the result of :func:`trace`, where several cuts are made of one model.

    Raises:
        ConfigError: no such cut (the message lists them).
        ModelError: torch.fx cannot trace the model, there is no 2-D feature map, or no ``num_classes`` and an output
            that is no batch of logits.
    """
    traced = traced if traced is not None else trace(model, example_inputs)
    point = traced.find(cut)
    classes = num_classes if num_classes is not None else class_count(traced.output_shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AuxiliaryHead(point.channels, classes, widths=head_widths)
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    if reference is not None:
        head.to(device=reference.device, dtype=reference.dtype)
    net = DepthPrunedNet.assemble(kept_part(model, traced, point), head, point.name, freeze=freeze)
    net.eval()
    return net


def class_count(shape: Sequence[int]) -> int:
    """C of logits (B, C) or (B, C, 1, 1).

    Raises:
        ModelError: an output of another shape.
    """
    if len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1)):
        return shape[1]
    raise ModelError(
        f"depth_pruning: the model returns {tuple(shape)}, not logits (B, C): give num_classes, or let forward() "
        "return logits"
    )


def save_depth_pruned(net: DepthPrunedNet, path: str | Path) -> None:
    """Write the weights and the cut to one safetensors file. The file appears whole or not at all.

    Raises:
        ModelError: channels were removed after the cut, so that :func:`load_depth_pruned` could not rebuild the net.
    """
    from safetensors.torch import save_file

    made, now = net.meta["depth_pruning"]["shapes"], _shapes(net)
    for name in sorted(made.keys() | now.keys()):
        if made.get(name) != now.get(name):
            raise ModelError(
                f"depth_pruning: {name!r} has shape {now.get(name)}, the cut left it with {made.get(name)}: the layers "
                "were changed since, and the file could not be loaded again. Prune channels of the dense network "
                "before the cut (torch_pruning, then depth_pruning), or keep the state_dict() and repeat both steps "
                "before load_state_dict()"
            )
    tensors = {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}
    header = json.dumps(
        {
            "cut": net.cut,
            "head_widths": net.head.widths,
            "num_classes": net.head.fc.out_features,
            "crc32": {name: crc32(tensor) for name, tensor in tensors.items()},
        }
    )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "header": header,
        "crc32": str(zlib.crc32(header.encode())),
    }
    partial = Path(f"{path}.partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def load_depth_pruned(path: str | Path, model: nn.Module, example_inputs: Any) -> DepthPrunedNet:
    """Read what :func:`save_depth_pruned` wrote; ``model`` is the dense network's architecture.

    Raises:
        FormatError: missing, truncated, altered or foreign file, one of another version, or one of another network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
    header = _header(path, metadata)
    for name, tensor in state.items():
        if crc32(tensor) != header["crc32"].get(name):
            raise FormatError(f"{path}: tensor {name!r} does not match its checksum; copy the file again")
    try:
        net = depth_prune(
            model,
            example_inputs,
            cut=header["cut"],
            head_widths=header["head_widths"],
            num_classes=header["num_classes"],
            freeze=False,
        )
        net.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise FormatError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return net


def _header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise FormatError(
            f"{path} is not a depth-pruned network of format {VERSION} (it says {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}); give a file that this release wrote, or update sigmab-plugin"
        )
    text = metadata.get("header", "")
    if str(zlib.crc32(text.encode())) != metadata.get("crc32"):
        raise FormatError(f"{path}: the header does not match its checksum; copy the file again")
    header: dict[str, Any] = json.loads(text)
    return header


def _shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in (*net.named_parameters(), *net.named_buffers())}
