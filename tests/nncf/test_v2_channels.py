"""NNCF's channel groups against Torch-Pruning's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def wrapped(nncf_v2: Any, model: nn.Module, *shape: int) -> Any:
    from nncf import NNCFConfig
    from nncf.torch.model_creation import create_nncf_network

    return create_nncf_network(
        model.eval(), NNCFConfig.from_dict({"input_info": {"sample_size": list(shape)}})
    )


def by_torch_pruning(model: nn.Module, example: torch.Tensor) -> set[frozenset[tuple[str, int]]]:
    """(tensor, dimension) of every group, without groups that reach the model's output."""
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, (example,))
    names = {module: name for name, module in model.named_modules()}
    result = set()
    for group in graph.get_all_groups(root_module_types=[nn.modules.conv._ConvNd, nn.Linear]):
        places = set()
        reads = False
        for item in group:
            module = item.dep.target.module
            if module not in names:
                continue
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)):
                places |= {
                    (f"{names[module]}.{t}", 0) for t in ("weight", "bias", "running_mean", "running_var")
                }
            elif out:
                places |= {(f"{names[module]}.weight", 0)}
                if module.bias is not None:
                    places |= {(f"{names[module]}.bias", 0)}
            else:
                reads = True
                places |= {(f"{names[module]}.weight", 1)}
        if reads:
            result.add(frozenset(places))
    return result


def by_nncf(network: Any) -> set[frozenset[tuple[str, int]]]:
    from sigmab_plugin.channels.nncf import channel_groups

    return {frozenset((m.tensor, m.dim) for m in group.members) for group in channel_groups(network)}


def test_resnet50(nncf_v2: Any) -> None:
    from sigmab_plugin.models import cifar_resnet50

    model = cifar_resnet50(10, width=1 / 16)
    expected = by_torch_pruning(model, torch.randn(2, 3, 32, 32))
    found = by_nncf(wrapped(nncf_v2, model, 2, 3, 32, 32))
    assert len(expected) == 1 + 2 * 16 + 4
    # NNCF never prunes what no further convolution reads: the stream of layer4, read by the classifier alone.
    assert found < expected
    (last,) = expected - found
    assert ("fc.weight", 1) in last
    assert ("layer4.0.conv3.weight", 0) in last


def test_get_pruning_groups_has_no_rule_for_convolutions(nncf_v2: Any) -> None:
    from nncf.experimental.common.pruning.nodes_grouping import get_pruning_groups
    from nncf.experimental.torch.pruning.operations import PT_EXPERIMENTAL_PRUNING_OPERATOR_METATYPES

    from sigmab_plugin.models import cifar_resnet18

    graph = wrapped(nncf_v2, cifar_resnet18(10, width=1 / 16), 2, 3, 16, 16).nncf.get_original_graph()
    groups = get_pruning_groups(graph, PT_EXPERIMENTAL_PRUNING_OPERATOR_METATYPES, ["linear"])
    assert [g for g in groups if g.consumers] == []


@pytest.mark.parametrize("part", ["sa1", "sa2", "sa3", "fc"])
def test_pointnet2_mlps(nncf_v2: Any, part: str) -> None:
    pytest.importorskip("torch_geometric")
    from sigmab_plugin.models import PointNet2

    model = PointNet2(10, width=1 / 8)
    modules = {
        "sa1": model.sa1.conv.local_nn,
        "sa2": model.sa2.conv.local_nn,
        "sa3": model.sa3.mlp,
        "fc": nn.Sequential(model.fc1, model.head),
    }
    layers = [
        m
        for m in modules[part].modules()
        if hasattr(m, "weight") and m.weight is not None and m.weight.ndim == 2
    ]
    plain = plain_mlp(modules[part], layers)
    example = torch.randn(8, layers[0].weight.shape[1])
    expected = by_torch_pruning(plain, example)
    assert len(expected) == len(layers) - 1
    assert by_nncf(wrapped(nncf_v2, plain, *example.shape)) == expected


def plain_mlp(module: nn.Module, layers: list[nn.Module]) -> nn.Module:
    """The MLP's layers as torch's own: torch-geometric's Linear is none, and neither framework prunes it as it is."""
    items: list[nn.Module] = []
    for index, layer in enumerate(layers):
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None)
        linear.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
        items.append(linear)
        if index < len(layers) - 1:
            items += [nn.BatchNorm1d(layer.weight.shape[0]), nn.ReLU()]
    return nn.Sequential(*items).eval()
