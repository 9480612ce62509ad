"""NNCF's functions: which operations a scope covers, and what a config file may not say without effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin.hosts.nncf_schema import Section, SectionError, check_levels, read
from sigmab_plugin.hosts.nncf_schema import sections as sections_of

Compress = Callable[..., nn.Module]


@pytest.fixture
def compress(nncf_functions: Any, dense: nn.Module, config_of: Any, loader: Any) -> Compress:
    from sigmab_plugin.hosts import nncf_v3

    def run(*sections: dict[str, Any], on_section: Any = None, **top: Any) -> nn.Module:
        dataset = nncf_functions.Dataset(loader, lambda batch: batch[0])
        return nncf_v3.compress(dense, config_of(*sections, **top), dataset, on_section=on_section)

    return run


@pytest.fixture
def left_out(nncf_functions: Any, dense: nn.Module, data: Any) -> Callable[..., set[str]]:
    """Operations that the ignored scopes of a quantization section keep out of the dense network's."""
    from sigmab_plugin.hosts.nncf_v3_parts import Part
    from sigmab_plugin.hosts.nncf_v3_scopes import SectionScopes

    def names(*scopes: str) -> set[str]:
        entry = Section(0, "quantization", {"algorithm": "quantization", "ignored_scopes": list(scopes)})
        part = Part("", dense, [data[0][:2]], [2])
        return SectionScopes(entry, (), "ResNet").left_out(part)

    return names


@pytest.fixture
def with_prune(nncf_functions: Any) -> None:
    if not hasattr(nncf_functions, "prune"):
        pytest.skip("this NNCF has no nncf.prune")


def masked(network: nn.Module) -> set[str]:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    hooks = {name for name, _ in get_hook_storage(network).named_hooks()}
    return {name.split(".")[1].split(":weight")[0].replace(":", ".") for name in hooks}


@pytest.mark.parametrize(
    ("scope", "operations"),
    [
        ("conv1/conv2d/0", {"conv1/conv2d/0"}),
        ("ResNet/NNCFConv2d[conv1]/conv2d_0", {"conv1/conv2d/0"}),
        ("layer4/0/conv2/conv2d/0", {"layer4/0/conv2/conv2d/0"}),
        ("ResNet/Sequential[layer3]/BasicBlock[0]/__iadd___0", {"layer3/0/add_/0"}),
        ("ResNet/Sequential[layer3]/BasicBlock[0]/ReLU[relu]/relu__1", {"layer3/0/relu/relu_/1"}),
        (
            "ResNet/Sequential[layer3]/BasicBlock[0]/ReLU[relu]/RELU_0",
            {"layer3/0/relu/relu_/0", "layer3/0/relu/relu_/1"},
        ),
        ("{re}ResNet/Sequential\\[layer4\\]/BasicBlock\\[0\\]/.*add", {"layer4/0/add_/0"}),
        ("{re}ResNet/Sequential\\[layer4\\]/.*downsample.*/conv2d", {"layer4/0/downsample/0/conv2d/0"}),
        ("{re}ResNet/NNCFConv2d\\[conv1\\]/conv2d", {"conv1/conv2d/0"}),
        ("{re}ResNet/layer2/.*downsample/0/conv2d", {"layer2/0/downsample/0/conv2d/0"}),
        ("{re}ResNet/Sequential\\[layer4\\]/.*/__iadd___0", {"layer4/0/add_/0"}),
        ("{re}.*layer4.*__iadd__.*", {"layer4/0/add_/0"}),
        ("{re}.*\\[layer4\\]/.*\\[conv1\\]/conv2d_[0-3]", {"layer4/0/conv1/conv2d/0"}),
        ("{re}^layer4/.*conv[12]/", {"layer4/0/conv1/conv2d/0", "layer4/0/conv2/conv2d/0"}),
        ("ResNet/Sequential[layer3]/BasicBlock[0]/__isub___0", set()),
        ("layer9/conv2d/0", set()),
    ],
)
def test_what_a_scope_covers(left_out: Callable[..., set[str]], scope: str, operations: set[str]) -> None:
    assert left_out(scope) == operations


def test_a_scope_of_a_module_covers_what_is_in_it(left_out: Callable[..., set[str]]) -> None:
    for scope in ("layer4", "ResNet/Sequential[layer4]"):
        covered = left_out(scope)
        assert {"layer4/0/conv1/conv2d/0", "layer4/0/add_/0"} <= covered
        assert all(name.startswith("layer4/") for name in covered)


def test_an_operation_of_the_network_itself(nncf_functions: Any) -> None:
    from sigmab_plugin.hosts.nncf_v3_parts import Part
    from sigmab_plugin.hosts.nncf_v3_scopes import SectionScopes

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.first(x) + x) / 2

    part = Part("", Sums(), [torch.zeros(2, 4)], [2])
    for scope, found in (("Sums/__add___0", "/add/0"), ("Sums/__truediv___0", "/div/0")):
        entry = Section(0, "quantization", {"ignored_scopes": scope})
        assert SectionScopes(entry, (), "Sums").left_out(part) == {found}


@pytest.mark.parametrize("own", [True, False], ids=["in the section", "at the top"])
def test_scopes_that_match_nothing_are_named(
    compress: Compress, sections: Any, with_prune: None, own: bool
) -> None:
    scopes = {"ignored_scopes": ["layer4", "layer9/conv2d/0"]}
    ran: list[Any] = []
    with pytest.raises(SectionError, match="'layer9/conv2d/0' in ignored_scopes") as caught:
        if own:
            compress({**sections["sparsity"], **scopes}, on_section=ran.append)
        else:
            compress(sections["sparsity"], **scopes, on_section=ran.append)
    assert "'layer4'" not in str(caught.value)
    assert not ran
    net = compress({**sections["sparsity"], "validate_scopes": False, **scopes})
    assert masked(net)
    assert not any(name.startswith("layer4") for name in masked(net))


def test_scopes_that_match_nothing_in_a_tree(compress: Compress, sections: Any, with_prune: None) -> None:
    listed = [sections["sigmab"], {**sections["sparsity"], "ignored_scopes": ["layer4/0/conv2/conv2d/0"]}]
    net = compress(*listed)
    assert "layer4.0.conv1" in masked(net.get_submodule("specializers.0_0"))
    assert "layer4.0.conv2" not in masked(net.get_submodule("specializers.0_0"))
    listed[1]["ignored_scopes"].append("layer4/0/conv7")
    with pytest.raises(SectionError, match="'layer4/0/conv7'"):
        compress(*listed)


def test_a_functional_operation_covers_no_level(dense: nn.Module, sections: Any) -> None:
    entries = sections_of({"compression": sections["sigmab"]})
    for scope in ("ResNet/Sequential[layer3]/BasicBlock[0]/__iadd___0", "layer3/0/add_/0"):
        check_levels(entries, dense, {"ignored_scopes": [scope]})
    for scope in ("ResNet/Sequential[layer3]/BasicBlock[0]", "layer3/0", "layer3"):
        with pytest.raises(Exception, match="ignored_scopes cover 'layer3'"):
            check_levels(entries, dense, {"ignored_scopes": [scope]})


def test_target_scopes(compress: Compress, dense: nn.Module, sections: Any, with_prune: None) -> None:
    net = compress({**sections["sparsity"], "target_scopes": ["{re}layer4/.*conv[12]/"]})
    assert masked(net) == {"layer4.0.conv1", "layer4.0.conv2"}
    pruned = compress({**sections["pruning"], "target_scopes": ["layer4"]})
    before, after = (
        {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
        for model in (dense, pruned)
    )
    assert {name for name in before if before[name] != after[name]} == {
        name for name in before if name.startswith("layer4")
    }


def test_filter_pruning_leaves_the_named_layer_alone(
    compress: Compress, dense: nn.Module, sections: Any
) -> None:
    first = {"prune_first_conv": True, **sections["pruning"]["params"]}
    pruned = compress({**sections["pruning"], "params": first, "ignored_scopes": ["conv1/conv2d/0"]})
    assert pruned.get_parameter("conv1.weight").shape[0] == 4
    assert pruned.get_parameter("layer1.0.conv1.weight").shape[0] < 4
    assert pruned.get_parameter("layer4.0.conv1.weight").shape[0] < 32


def test_settings_without_effect_are_reported_once(
    nncf_functions: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from sigmab_plugin.hosts.nncf_v3_sections import runner_of

    section = {
        "algorithm": "quantization",
        "quantize_inputs": False,
        "weights": {"ignored_scopes": ["{re}layer4"], "bits": 8},
        "target_scopes": ["layer4"],
    }
    with caplog.at_level(logging.WARNING):
        runner_of(sections_of({"compression": section})[0])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "target_scopes, quantize_inputs, weights.ignored_scopes: no counterpart" in line


def test_modes_of_a_side_reach_nncf(nncf_functions: Any) -> None:
    from sigmab_plugin.hosts.nncf_v3_arguments import quantization_arguments
    from sigmab_plugin.hosts.nncf_v3_parts import Part
    from sigmab_plugin.hosts.nncf_v3_scopes import SectionScopes

    values = {"activations": {"mode": "asymmetric"}, "weights": {"per_channel": False}}
    entry = Section(0, "quantization", {"algorithm": "quantization", **values, "model_type": "transformer"})
    arguments, _ = quantization_arguments(entry, SectionScopes(entry, (), ""), "TRIAL")
    given = arguments(Part("", nn.Linear(2, 2), [torch.zeros(1, 2)], [1]))
    advanced = given["advanced_parameters"]
    assert advanced.activations_quantization_params.mode.value == "asymmetric"
    assert advanced.weights_quantization_params.per_channel is False
    assert given["model_type"].value == "transformer"
    assert given["target_device"].name == "ANY"


@pytest.mark.parametrize(
    ("section", "top", "words"),
    [
        ({}, {"target_device": "NOPE"}, "target_device must be one of .*'NOPE'"),
        ({"overflow_fix": "nope"}, {}, "overflow_fix must be one of 'enable'"),
        ({"model_type": "Transformer"}, {}, "model_type must be one of 'transformer'"),
        ({"weights": []}, {}, "weights must be an object"),
        ({"activations": {"mode": "odd"}}, {}, "activations.mode must be one of"),
        ({"subset_size": "many"}, {}, "must be a number"),
    ],
)
def test_wrong_values_are_found_before_any_work(
    compress: Compress, sections: Any, section: Any, top: Any, words: str
) -> None:
    ran: list[Any] = []
    with pytest.raises(SectionError, match=words):
        compress(sections["sigmab"], {**sections["quantization"], **section}, **top, on_section=ran.append)
    assert not ran


def test_sparsity_after_weight_compression(compress: Compress, sections: Any, with_prune: None) -> None:
    ran: list[Any] = []
    with pytest.raises(SectionError, match="Put magnitude_sparsity first"):
        compress({"algorithm": "weight_compression"}, sections["sparsity"], on_section=ran.append)
    assert not ran


def test_a_config_without_sections() -> None:
    with pytest.raises(SectionError, match=r"'compression' is missing or empty.*'compresion'"):
        read({"input_info": {}, "compresion": [{"algorithm": "quantization"}]})
    with pytest.raises(SectionError, match="missing or empty"):
        read({"compression": []})
    bare = {"algorithm": "quantization", "preset": "mixed"}
    assert read(bare) == {"compression": [bare]}


def test_modes_of_frozen_submodules_stay(
    compress: Compress, dense: nn.Module, sections: Any, with_prune: None
) -> None:
    dense.train()
    dense.get_submodule("bn1").eval()
    modes = [module.training for module in dense.modules()]
    compress(sections["sparsity"])
    assert [module.training for module in dense.modules()] == modes


@pytest.mark.parametrize("tree", [False, True], ids=["dense", "tree"])
def test_strip_folds_masks(
    compress: Compress, sections: Any, data: Any, with_prune: None, tree: bool
) -> None:
    from sigmab_plugin.hosts import nncf_v3

    net = compress(*([sections["sigmab"]] if tree else []), sections["sparsity"])
    stripped = nncf_v3.strip(net, data[0][:4])
    with torch.no_grad():
        assert torch.equal(stripped(data[0]), net(data[0]))
    weights = [m.weight for n, m in stripped.named_modules() if isinstance(m, nn.Conv2d)]
    zeros = torch.cat([weight.flatten() for weight in weights]).eq(0).float().mean()
    assert float(zeros) == pytest.approx(0.5, abs=0.03)
    assert "UnstructuredPruningMask" not in {type(module).__name__ for module in stripped.modules()}
    assert all(weight.requires_grad for weight in weights)


def test_what_the_device_does_not_have(compress: Compress, sections: Any) -> None:
    with pytest.raises(SectionError, match=r"weights, activations: .* incompatible"):
        compress({**sections["quantization"], "activations": {"per_channel": True}})
