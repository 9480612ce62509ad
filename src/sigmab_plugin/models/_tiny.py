"""What the two MLPerf Tiny networks share: TensorFlow's "same" padding and the separable block."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, ModelError

#: Keras's normalisation epsilon in both networks.
EPSILON = 1e-3

Size = tuple[int, int]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) one axis under TensorFlow's ``padding="same"``: the odd one goes after."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def same_size(size: Size, stride: int) -> Size:
    """Height and width after a "same" convolution."""
    return math.ceil(size[0] / stride), math.ceil(size[1] / stride)


def same_conv(
    in_channels: int, out_channels: int, kernel: Size, *, size: Size, stride: int, groups: int = 1
) -> list[tuple[str, nn.Module]]:
    """A convolution with bias under "same" padding for inputs of ``size``: [pad], conv.

    Symmetric padding is given to the convolution itself; asymmetric padding needs a layer of its own.
    """
    (top, bottom), (left, right) = (same_padding(n, k, stride) for n, k in zip(size, kernel, strict=True))
    symmetric = top == bottom and left == right
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=(top, left) if symmetric else 0,
        groups=groups,
    )
    if symmetric:
        return [("conv", conv)]
    return [("pad", nn.ZeroPad2d((left, right, top, bottom))), ("conv", conv)]


def normalised(
    prefix: str, layers: Sequence[tuple[str, nn.Module]], channels: int
) -> list[tuple[str, nn.Module]]:
    """``layers`` followed by BatchNorm and ReLU, all named ``prefix...``."""
    named = [(prefix + name, layer) for name, layer in layers]
    return [*named, (prefix + "bn", nn.BatchNorm2d(channels, eps=EPSILON)), (prefix + "relu", nn.ReLU())]


def separable_block(in_channels: int, out_channels: int, *, size: Size, stride: int = 1) -> nn.Sequential:
    """Depthwise 3x3, BatchNorm, ReLU, pointwise 1x1, BatchNorm, ReLU: (B, C, H, W) -> (B, C', H', W')."""
    depthwise = same_conv(in_channels, in_channels, (3, 3), size=size, stride=stride, groups=in_channels)
    pointwise = [("conv", nn.Conv2d(in_channels, out_channels, 1))]
    return nn.Sequential(
        OrderedDict([*normalised("dw_", depthwise, in_channels), *normalised("pw_", pointwise, out_channels)])
    )


def load_renamed(model: nn.Module, path: str | Path, names: Mapping[str, str]) -> dict[str, str]:
    """Load the safetensors file ``path`` into ``model``; ``names``: layer in the file -> layer here.

    Returns:
        The file's metadata (architecture, input normalisation, licence).

    Raises:
        FormatError: the file is not of this network: missing, surplus or wrongly shaped tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except SafetensorError as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}. Fetch it again.") from error
    state: dict[str, Any] = {}
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if layer not in names:
            raise FormatError(f"{path} has tensor {key!r}, which {type(model).__name__} does not know")
        state[f"{names[layer]}.{leaf}"] = tensor
    own = model.state_dict()
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
        elif key not in state:
            raise FormatError(f"{path} lacks the tensor for {key!r} of {type(model).__name__}")
        elif state[key].shape != value.shape:
            raise FormatError(
                f"{path}: {key!r} is {tuple(state[key].shape)}, the network has {tuple(value.shape)}; "
                "build the network with the checkpoint's sizes"
            )
    model.load_state_dict(state)
    return metadata


def check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ModelError(f"{name} must be at least 1; got {value}")
