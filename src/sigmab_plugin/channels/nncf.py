"""Channel groups as NNCF 2.x sees them, converted to :class:`ChannelGroup`.

NNCF knows two kinds, and neither alone covers a network:

* ``get_pruning_groups`` (``nncf.experimental.common.pruning``) propagates masks from *linear* layers. It has no pruning
  operation for convolutions, so a convolutional network has no groups there.
* ``PruningNodeSelector.create_pruning_groups`` (``nncf.common.pruning``), which filter pruning uses, clusters
  *convolutions* whose outputs meet in an element-wise operation. It names producers only.

Here both are asked, and what reads or normalises a group's channels is found on NNCF's own graph by NNCF's mask
propagation. Needs an ``NNCFNetwork`` (2.x, legacy tracing).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import ModelError
from .groups import ChannelGroup, Member

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_NORMS = ("batch_norm", "group_norm", "layer_norm")
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def channel_groups(network: Any) -> tuple[ChannelGroup, ...]:
    """Groups of an ``NNCFNetwork``'s original graph, in order of execution; all in segment 0.

    Left out, because NNCF cannot express them: groups that reach an operation without a pruning rule (scatter and
    index operations of PyG's message passing, ``cat`` in ``get_pruning_groups``), grouped convolutions that are not
    depthwise, and convolutions that no further convolution reads ("closing convolution missing": the last stream of a
    ResNet, which the classifier alone reads).

    Raises:
        ModelError: not an ``NNCFNetwork``.
    """
    if not hasattr(network, "nncf"):
        raise ModelError(
            "NNCF's channel groups need an NNCFNetwork: nncf.torch.create_compressed_model or wrap_model"
        )
    graph = network.nncf.get_original_graph()
    clusters = [*_convolution_clusters(graph), *_linear_clusters(graph)]
    groups = [_group(network, graph, cluster) for cluster in clusters]
    return tuple(sorted((g for g in groups if g is not None), key=lambda g: _position(network, g.name)))


def _position(network: Any, name: str) -> int:
    return next((i for i, (known, _) in enumerate(network.named_modules()) if known == name), 0)


def _convolution_clusters(graph: Any) -> list[list[Any]]:
    from nncf.common.pruning.node_selector import PruningNodeSelector
    from nncf.torch.pruning.operations import PT_PRUNING_OPERATOR_METATYPES, PTElementwisePruningOp

    selector = PruningNodeSelector(
        PT_PRUNING_OPERATOR_METATYPES,
        list(_CONVOLUTIONS),
        PTElementwisePruningOp.get_all_op_aliases(),
        None,
        None,
        True,
        True,
    )
    return [list(cluster.elements) for cluster in selector.create_pruning_groups(graph).get_all_clusters()]


def _linear_clusters(graph: Any) -> list[list[Any]]:
    from nncf.experimental.common.pruning.nodes_grouping import get_pruning_groups, select_largest_groups
    from nncf.experimental.torch.pruning.operations import PT_EXPERIMENTAL_PRUNING_OPERATOR_METATYPES

    linear = [node for node in graph.get_nodes_by_types(["linear"]) if graph.get_output_edges(node)]
    if not linear:
        return []
    found = get_pruning_groups(graph, PT_EXPERIMENTAL_PRUNING_OPERATOR_METATYPES, ["linear"])
    clusters = []
    for group in select_largest_groups([g for g in found if g.consumers]):
        clusters.append([graph.get_node_by_id(producer.node_id) for producer in sorted_producers(group)])
    return clusters


def sorted_producers(group: Any) -> list[Any]:
    return sorted(group.producers, key=lambda producer: producer.node_id)


def _group(network: Any, graph: Any, producers: list[Any]) -> ChannelGroup | None:
    layers = sorted({_layer(node) for node in producers}, key=lambda name: _position(network, name))
    size = network.get_submodule(layers[0]).weight.shape[0]
    members: dict[tuple[str, int], Member] = {}

    def add(layer: str, tensor: str, dim: int, role: str) -> None:
        module = network.get_submodule(layer)
        value = getattr(module, tensor, None)
        if value is not None and value.ndim:
            members.setdefault((f"{layer}.{tensor}", dim), Member(0, f"{layer}.{tensor}", dim, role))

    for layer in layers:
        add(layer, "weight", 0, "out")
        add(layer, "bias", 0, "out")
    for node, role in _readers(graph, producers):
        layer = _layer(node)
        module = network.get_submodule(layer)
        if role == "norm":
            for tensor in _NORM_TENSORS:
                add(layer, tensor, 0, "out")
        elif getattr(module, "groups", 1) > 1:
            add(layer, "weight", 0, "out")
            add(layer, "bias", 0, "out")
        elif module.weight.shape[1] == size:
            add(layer, "weight", 1, "in")
        elif module.weight.shape[1] % size == 0:  # flattened: each channel is a block of inputs
            block = module.weight.shape[1] // size
            members[(f"{layer}.weight", 1)] = Member(
                0,
                f"{layer}.weight",
                1,
                "in",
                positions=tuple(range(module.weight.shape[1])),
                channels=tuple(i // block for i in range(module.weight.shape[1])),
            )
        else:
            return None
    if not any(member.role == "in" for member in members.values()):
        return None
    return ChannelGroup(layers[0], size, 0, tuple(members.values()))


def _layer(node: Any) -> str:
    """Qualified module name of a node: its scope without classes."""
    from ..hosts.nncf_schema import module_path

    return module_path(node.node_name)


def _readers(graph: Any, producers: list[Any]) -> Iterator[tuple[Any, str]]:
    """Layers behind the producers that hold or read the same channels, up to the next weighted layer."""
    queue = [follower for node in producers for follower in graph.get_next_nodes(node)]
    seen = set()
    while queue:
        node = queue.pop(0)
        if node.node_id in seen:
            continue
        seen.add(node.node_id)
        if node.node_type in (*_CONVOLUTIONS, "linear"):
            yield node, "reads"
            attributes = node.layer_attributes
            if getattr(attributes, "groups", 1) == 1 or node.node_type == "linear":
                continue
        elif node.node_type in _NORMS:
            yield node, "norm"
        queue.extend(graph.get_next_nodes(node))
