"""SigmaB, then Mix-and-Match; and Mix-and-Match through Torch-Pruning's calling convention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBNet, SigmaBPruner
from sigmab_plugin.counting import parameter_count
from sigmab_plugin.errors import CalibrationError, ConfigError
from sigmab_plugin.hosts.torch_pruning_techniques import MixAndMatchPruner
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.mix_and_match import MixAndMatchConfig, find_layers, technique

from .mix_and_match_models import SmallResNet, accuracy, batches, train

DATA = batches(6)
TRAIN, VALIDATION = DATA[:4], DATA[4:]
FEW = MixAndMatchConfig(scores=("magnitude",), strategies=("min", "max"), finetune_epochs=1)


def validate(net: nn.Module) -> float:
    return accuracy(net, VALIDATION)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return train(SmallResNet(), TRAIN, 5)


@pytest.fixture(scope="module")
def tree(dense: nn.Module) -> SigmaBNet:
    pruner = SigmaBPruner(
        dense, TRAIN[0][0], levels=["layer2", "layer3"], head="fc", calibration_data=TRAIN, projection_dim=16
    )
    return pruner.step().eval()


def test_roles_in_a_tree(tree: SigmaBNet) -> None:
    roles = {layer.name: layer.role for layer in find_layers(tree, TRAIN[0][0])}
    assert {role for name, role in roles.items() if name.startswith("routers.")} <= {
        "router",
        "normalization",
    }
    heads = {name for name, role in roles.items() if role == "classifier"}
    assert len(heads) == len(tree.leaves)
    assert all(name.startswith("heads.") for name in heads)
    for leaf in tree.leaves:  # every leaf is found, whichever the example is routed to
        assert any(name.startswith(f"specializers.{leaf.replace('/', '_')}.") for name in roles)


def test_masks_on_a_tree(tree: SigmaBNet) -> None:
    before = copy.deepcopy(tree.state_dict())
    context = Context(example_inputs=TRAIN[0][0], train_data=TRAIN, validate=validate)
    result = technique.apply(tree, FEW.replace(max_drop=1.0, small_layer_parameters=0), context)
    assert isinstance(result, SigmaBNet)
    assert all(torch.equal(before[name], value) for name, value in tree.state_dict().items())
    assert tree.routing == result.routing == "auto"
    for leaf in tree.leaves:
        masked = zeros = 0
        for _, module in tree.path_modules(leaf):
            twin = dict(result.named_modules())[next(n for n, m in tree.named_modules() if m is module)]
            for parameter in twin.parameters():
                masked += parameter.numel()
                zeros += int((parameter == 0).sum())
        assert zeros / masked > 0.2
    assert result.mix_and_match["chosen"] == "magnitude-max"


@pytest.mark.parametrize("match", ["channels", "parameters"])
def test_structured_pruner(dense: nn.Module, match: str) -> None:
    before = copy.deepcopy(dense.state_dict())
    pruner = MixAndMatchPruner(
        dense, TRAIN[0][0], validate=validate, train_data=TRAIN, config=FEW, structured=True, structured_match=match,
        max_drop=1.0, round_to=2,
    )  # fmt: skip
    net = pruner.step()
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert parameter_count(net) < 0.9 * parameter_count(dense)
    assert net(TRAIN[0][0]).shape == (32, 4)
    assert pruner.result.chosen.sparsity == pytest.approx(1 - parameter_count(net) / parameter_count(dense))
    assert all(m.out_channels % 2 == 0 for m in net.modules() if isinstance(m, nn.Conv2d))


def test_structured_pruner_refuses_a_tree(tree: SigmaBNet) -> None:
    """Its result could not be saved: said before a search is trained, with the reason that lists of sections give."""
    with pytest.raises(ConfigError, match="plan of the tree records the widths"):
        MixAndMatchPruner(tree, TRAIN[0][0], validate=validate, train_data=TRAIN, structured=True)
    MixAndMatchPruner(tree, TRAIN[0][0], validate=validate, train_data=TRAIN)


def test_masking_pruner(dense: nn.Module) -> None:
    pruner = MixAndMatchPruner(
        dense, TRAIN[0][0], None, validate=validate, train_data=TRAIN, ignored_layers=[dense.conv1],
        scores=("combined",), strategies=("max",), finetune_epochs=1,
    )  # fmt: skip
    net = pruner.step()
    assert int((net.conv1.weight == 0).sum()) == 0
    assert pruner.result.chosen.key == "combined-max"
    assert int((net.layer3.conv2.weight == 0).sum()) > 0
    with pytest.raises(CalibrationError, match="validate"):
        MixAndMatchPruner(dense, TRAIN[0][0])
