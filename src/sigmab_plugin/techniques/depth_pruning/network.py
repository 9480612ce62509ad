"""The auxiliary head and the network that it closes (arXiv 2204.10546, section 3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ...errors import FormatError, ModelError
from .cuts import TracedModel, kept_part, trace

#: Name of the auxiliary head in a :class:`DepthPrunedNet`.
HEAD = "auxiliary_head"
#: What :func:`save_depth_pruned` calls its files.
FORMAT = "sigmab_plugin.depth_pruning"


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
        net.meta["depth_pruning"] = {"cut": cut, "freeze": freeze}
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
        """Freeze the kept layers (or let them train again)."""
        self.meta["depth_pruning"]["freeze"] = kept
        self.requires_grad_(not kept)
        self.head.requires_grad_(True)
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
        num_classes: outputs; as many as the model has, where not given.
        freeze: the kept layers do not train.
        seed: seed of the head's weights; the global generator is left alone.
        traced: the result of :func:`trace`, where several cuts are made of one model.

    Raises:
        ConfigError: no such cut (the message lists them).
        ModelError: torch.fx cannot trace the model, or there is no 2-D feature map.
    """
    traced = traced if traced is not None else trace(model, example_inputs)
    point = traced.find(cut)
    classes = num_classes if num_classes is not None else traced.output_shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AuxiliaryHead(point.channels, classes, widths=head_widths)
    reference = next(model.parameters(), None)
    if reference is not None:
        head.to(device=reference.device, dtype=reference.dtype)
    net = DepthPrunedNet.assemble(kept_part(model, traced, point), head, point.name, freeze=freeze)
    net.eval()
    return net


def save_depth_pruned(net: DepthPrunedNet, path: str | Path) -> None:
    """Write the weights and the cut to one safetensors file."""
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "version": "1",
        "cut": net.cut,
        "head_widths": " ".join(map(str, net.head.widths)),
        "num_classes": str(net.head.fc.out_features),
    }
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}, str(path), metadata
    )


def load_depth_pruned(path: str | Path, model: nn.Module, example_inputs: Any) -> DepthPrunedNet:
    """Read what :func:`save_depth_pruned` wrote; ``model`` is the dense network's architecture.

    Raises:
        FormatError: missing, truncated, foreign or newer file, or a file of another network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != "1":
        raise FormatError(
            f"{path} is not a depth-pruned network of format 1 (it says {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}); update sigmab-plugin, or give the right file"
        )
    net = depth_prune(
        model,
        example_inputs,
        cut=metadata["cut"],
        head_widths=tuple(map(int, metadata["head_widths"].split())),
        num_classes=int(metadata["num_classes"]),
        freeze=False,
    )
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise FormatError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return net
