"""How each layer class stores its channels, and which of its attributes follow from the shapes.

One entry per class; ``register_layout`` adds a class of the user's. A layer with no entry that
Torch-Pruning can cut through a customised pruner is probed instead (:mod:`.probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

#: (tensor name, dim, positions along dim, channel indices of the layer at those positions)
Place = tuple[str, int, Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Layout:
    """Where a layer keeps its output and input channels.

    Attributes:
        places: ``places(layer, "out" | "in", idxs)`` -> places of channels ``idxs``.
        refresh: sets attributes such as ``in_channels`` from the tensors' shapes after slicing.
        coupled: input and output channels are the same ones (normalisation, depthwise).
        partitions: ``partitions(layer, role)`` -> number of equal blocks that must stay equal.
    """

    places: Callable[[Any, str, Sequence[int]], Iterable[Place]]
    refresh: Callable[[Any], None]
    coupled: Callable[[Any], bool] = lambda layer: False
    partitions: Callable[[Any, str], int] = lambda layer, role: 1


_layouts: dict[type[nn.Module], Layout] = {}


def register_layout(kind: type[nn.Module], layout: Layout) -> None:
    """Teach the slicer a layer class; subclasses inherit it."""
    _layouts[kind] = layout


def unregister_layout(kind: type[nn.Module]) -> None:
    _layouts.pop(kind, None)


def layout_of(layer: Any) -> Layout | None:
    """The layout of the nearest class in the layer's method resolution order, or None."""
    for kind in type(layer).__mro__:
        if kind in _layouts:
            return _layouts[kind]
    return _pyg_layouts().get(type(layer).__module__ + "." + type(layer).__qualname__)


def refresh_attributes(layer: Any) -> None:
    layout = layout_of(layer)
    if layout is not None:
        layout.refresh(layer)


def _present(layer: Any, *names: str) -> list[str]:
    return [name for name in names if getattr(layer, name, None) is not None]


# Convolutions. A grouped convolution stores in_channels / groups input columns; its groups must
# keep the same offsets, so that one column stands for the same offset of every group.


def _is_depthwise(layer: Any) -> bool:
    return layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels


def _conv_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    bias: list[Place] = [(name, 0, idxs, idxs) for name in _present(layer, "bias")]
    if _is_depthwise(layer):
        return [("weight", 0, idxs, idxs), *bias]
    transposed = getattr(layer, "transposed", False)
    # The dimension that PyTorch stores divided by the number of convolution groups.
    divided = "out" if transposed else "in"
    dim = 0 if (role == "out") != transposed else 1
    if role == divided:
        per_group = (layer.out_channels if role == "out" else layer.in_channels) // layer.groups
        positions: Sequence[int] = [c % per_group for c in idxs] if layer.groups > 1 else idxs
    else:
        positions = idxs
    return [("weight", dim, positions, idxs), *(bias if role == "out" else [])]


def _refresh_conv(layer: Any) -> None:
    rows, columns = layer.weight.shape[0], layer.weight.shape[1]
    if _is_depthwise(layer):
        layer.out_channels = layer.in_channels = layer.groups = rows
    elif getattr(layer, "transposed", False):
        layer.in_channels, layer.out_channels = rows, columns * layer.groups
    else:
        layer.out_channels, layer.in_channels = rows, columns * layer.groups


def _conv_partitions(layer: Any, role: str) -> int:
    return 1 if _is_depthwise(layer) else layer.groups


register_layout(
    nn.modules.conv._ConvNd,
    Layout(_conv_places, _refresh_conv, coupled=_is_depthwise, partitions=_conv_partitions),
)


def _linear_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    if role == "in":
        return [("weight", 1, idxs, idxs)]
    return [(name, 0, idxs, idxs) for name in _present(layer, "weight", "bias")]


def _refresh_linear(layer: Any) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _refresh_pyg_linear(layer: Any) -> None:
    layer.out_channels, layer.in_channels = layer.weight.shape


register_layout(nn.Linear, Layout(_linear_places, _refresh_linear))


def _norm_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    names = _present(layer, "weight", "bias", "running_mean", "running_var")
    return [(name, 0, idxs, idxs) for name in names]


def _always(layer: Any) -> bool:
    return True


def _set_from_weight(attribute: str) -> Callable[[Any], None]:
    def refresh(layer: Any) -> None:
        names = _present(layer, "weight", "running_mean")
        if names:
            setattr(layer, attribute, getattr(layer, names[0]).shape[0])

    return refresh


register_layout(
    nn.modules.batchnorm._NormBase, Layout(_norm_places, _set_from_weight("num_features"), coupled=_always)
)
register_layout(
    nn.GroupNorm,
    Layout(
        _norm_places,
        _set_from_weight("num_channels"),
        coupled=_always,
        partitions=lambda layer, role: layer.num_groups,
    ),
)


def _layernorm_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    last = len(layer.normalized_shape) - 1
    return [(name, last, idxs, idxs) for name in _present(layer, "weight", "bias")]


def _refresh_layernorm(layer: Any) -> None:
    if layer.weight is not None:
        layer.normalized_shape = tuple(layer.weight.shape)


register_layout(nn.LayerNorm, Layout(_layernorm_places, _refresh_layernorm, coupled=_always))


def _prelu_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    return [("weight", 0, idxs, idxs)] if layer.num_parameters > 1 else []


register_layout(nn.PReLU, Layout(_prelu_places, _set_from_weight("num_parameters"), coupled=_always))


def _embedding_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    return [("weight", 1, idxs, idxs)]


def _refresh_embedding(layer: Any) -> None:
    layer.embedding_dim = layer.weight.shape[1]


register_layout(nn.Embedding, Layout(_embedding_places, _refresh_embedding, coupled=_always))


def _attention_places(layer: Any, role: str, idxs: Sequence[int]) -> list[Place]:
    """Embedding channels of a self-attention: rows and columns of q, k, v and of the output."""
    embed = layer.embed_dim
    thrice = [c + part * embed for part in range(3) for c in idxs]
    owners = list(idxs) * 3
    places: list[Place] = []
    if layer.in_proj_weight is not None:
        places += [("in_proj_weight", 0, thrice, owners), ("in_proj_weight", 1, idxs, idxs)]
    for name in _present(layer, "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        places += [(name, 0, idxs, idxs), (name, 1, idxs, idxs)]
    if layer.in_proj_bias is not None:
        places.append(("in_proj_bias", 0, thrice, owners))
    places += [(name, 2, idxs, idxs) for name in _present(layer, "bias_k", "bias_v")]
    places += [("out_proj.weight", 0, idxs, idxs), ("out_proj.weight", 1, idxs, idxs)]
    if layer.out_proj.bias is not None:
        places.append(("out_proj.bias", 0, idxs, idxs))
    return places


def _refresh_attention(layer: Any) -> None:
    layer.embed_dim = layer.kdim = layer.vdim = layer.out_proj.weight.shape[0]
    layer.head_dim = layer.embed_dim // layer.num_heads


register_layout(
    nn.MultiheadAttention,
    Layout(
        _attention_places,
        _refresh_attention,
        coupled=_always,
        partitions=lambda layer, role: layer.num_heads,
    ),
)


def _pyg_layouts() -> dict[str, Layout]:
    """torch-geometric's layers, matched by name so that this module need not import it."""
    linear = Layout(_linear_places, _refresh_pyg_linear)
    norm = Layout(lambda layer, role, idxs: [], _refresh_pyg_norm, coupled=_always)
    return {
        "torch_geometric.nn.dense.linear.Linear": linear,
        "torch_geometric.nn.norm.batch_norm.BatchNorm": norm,
        "torch_geometric.nn.models.mlp.MLP": Layout(lambda layer, role, idxs: [], _refresh_pyg_mlp),
    }


def _refresh_pyg_norm(layer: Any) -> None:
    layer.in_channels = layer.module.num_features


def _refresh_pyg_mlp(layer: Any) -> None:
    lins = list(layer.lins)
    layer.channel_list = [lins[0].weight.shape[1], *(lin.weight.shape[0] for lin in lins)]
