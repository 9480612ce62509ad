"""Scopes of the dense network, as NNCF 2.x meets them in a restructured one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

TREE = (
    "SigmaBNet/GraphModule[backbone]/NNCFConv2d[conv1]/conv2d_0",
    "SigmaBNet/GraphModule[backbone]/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0",
    "SigmaBNet/ModuleDict[specializers]/GraphModule[0]/Sequential[layer3]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0",
    "SigmaBNet/ModuleDict[specializers]/GraphModule[0_1]/Sequential[layer4]/BasicBlock[0]/NNCFConv2d[conv2]/conv2d_0",
    "SigmaBNet/ModuleDict[specializers]/GraphModule[0_1]/flatten_0",
    "SigmaBNet/ModuleDict[pools]/_Pool[root]/flatten_0",
    "SigmaBNet/ModuleDict[routers]/Router[root]/NNCFLinear[linear]/linear_0",
    "SigmaBNet/ModuleDict[heads]/GraphModule[0_1]/NNCFLinear[fc]/linear_0",
)


@pytest.mark.parametrize(
    ("scope", "matched"),
    [
        ("ResNet/NNCFConv2d[conv1]/conv2d_0", (0,)),
        ("ResNet/NNCFLinear[fc]/linear_0", (7,)),
        ("ResNet/flatten_0", (4,)),
        ("ResNet/Sequential[layer4]/BasicBlock[0]/NNCFConv2d[conv2]/conv2d_0", (3,)),
        ("ResNet/NNCFConv2d[conv9]/conv2d_0", ()),
        (r"{re}ResNet/NNCFConv2d\[conv1\].*", (0,)),
        (r"{re}^ResNet/Sequential\[layer3\].*", (2,)),
        (r"{re}ResNet/.*conv2/.*", ()),
        (r"{re}ResNet/.*conv2\].*", (3,)),
        (r"{re}ResNet/.*linear.*", (7,)),
        (r"{re}(ResNet/Sequential\[layer3\].*|ResNet/NNCFLinear\[fc\].*)", (2, 7)),
        (r"{re}^(?:ResNet/Sequential\[layer3\].*|^ResNet/NNCFLinear\[fc\].*)", (2, 7)),
        (r"{re}NNCFConv2d\[conv1\]", (0, 1, 2)),
        ("SigmaBNet/GraphModule[backbone]/NNCFConv2d[conv1]/conv2d_0", (0,)),
        (r"{re}SigmaBNet/ModuleDict\[routers\].*", (6,)),
    ],
)
def test_a_dense_scope_names_the_same_layers_of_a_tree(
    nncf_v2: Any, scope: str, matched: tuple[int, ...]
) -> None:
    from nncf.common.scopes import matches_any

    from sigmab_plugin.hosts.nncf_v2_scopes import scope_in_tree

    rewritten = scope_in_tree(scope)
    assert tuple(i for i, name in enumerate(TREE) if matches_any(name, [rewritten])) == matched


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ("Net/NNCFConv2d[conv1]/conv2d_0", "Other/NNCFConv2d[conv1]/conv2d_0"),
        (r"{re}Net/.*conv1.*", "Other/NNCFConv2d[conv1]/conv2d_0"),
        (
            "Net/Sequential[features]/NNCFConv2d[3]/conv2d_0",
            "SigmaBNet/ModuleDict[specializers]/GraphModule[1]/Module[features]/NNCFConv2d[3]/conv2d_0",
        ),
    ],
)
def test_a_dense_scope_holds_in_other_results(nncf_v2: Any, scope: str, name: str) -> None:
    from nncf.common.scopes import matches_any

    from sigmab_plugin.hosts.nncf_v2_scopes import scope_in_tree

    assert matches_any(name, [scope_in_tree(scope)])


def test_a_scope_that_matches_nothing_is_reported_as_it_was_written(
    build: Any, dense: nn.Module, sections: Any
) -> None:
    scope = "ResNet/NNCFConv2d[conv9]/conv2d_0"
    with pytest.raises(Exception, match=re.escape(scope)):
        build(dense, sections["sigmab"], {**sections["sparsity"], "ignored_scopes": [scope]})


def test_scopes_that_are_keys_are_rewritten_too(nncf_v2: Any, config_of: Any, sections: Any) -> None:
    from nncf import NNCFConfig

    from sigmab_plugin.hosts.nncf_v2_scopes import config_for_new_network

    scope = "ResNet/Sequential[layer4]/BasicBlock[0]/NNCFConv2d[conv2]/conv2d_0"
    section = {**sections["quantization"], "scope_overrides": {"weights": {scope: {"mode": "asymmetric"}}}}
    config = config_for_new_network(NNCFConfig.from_dict(config_of(sections["sigmab"], section)), 1)
    [(key, changes)] = config["compression"][1]["scope_overrides"]["weights"].items()
    assert re.search(key.removeprefix("{re}"), TREE[3])
    assert not re.search(key.removeprefix("{re}"), TREE[2])
    assert changes == {"mode": "asymmetric"}


@pytest.mark.parametrize(
    ("scope", "layers"),
    [
        ("ResNet/NNCFConv2d[conv1]/conv2d_0", {"backbone.conv1"}),
        (
            r"{re}ResNet/.*layer3.*downsample.*",
            {f"specializers.{key}.layer3.0.downsample.0" for key in (0, 1)},
        ),
    ],
)
def test_layers_left_out_in_a_tree_are_those_of_the_dense_network(
    build: Any, dense: nn.Module, sections: Any, scope: str, layers: set[str]
) -> None:
    def masked(network: nn.Module) -> set[str]:
        return {
            name
            for name, module in network.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear)) and len(getattr(module, "pre_ops", ())) > 0
        }

    _, every = build(dense, sections["sigmab"], sections["sparsity"])
    _, fewer = build(dense, sections["sigmab"], {**sections["sparsity"], "ignored_scopes": [scope]})
    assert masked(every) - masked(fewer) == layers


@pytest.fixture
def build(nncf_v2: Any, config_of: Any, loader: Any, tmp_path: Any) -> Any:
    from nncf import NNCFConfig

    def make(model: nn.Module, *entries: dict[str, Any]) -> Any:
        config = NNCFConfig.from_dict(config_of(*entries, log_dir=str(tmp_path)))
        config = nncf_v2.register_default_init_args(config, loader)
        return nncf_v2.create_compressed_model(model, config, dump_graphs=False)

    return make
