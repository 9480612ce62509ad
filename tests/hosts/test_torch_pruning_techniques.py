"""LegoNet and Mix-and-Match with Torch-Pruning's calling convention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from sigmab_plugin.errors import ConfigError, ModelError
from sigmab_plugin.hosts.torch_pruning_techniques import LegoNetPruner, MixAndMatchPruner
from sigmab_plugin.techniques.mix_and_match import MixAndMatchConfig

from ..techniques.mix_and_match_models import SmallResNet, batches

DATA = batches(1)
CONFIG = MixAndMatchConfig(
    finetune_epochs=0, criteria=("magnitude",), strategies=("max",), small_layer_parameters=0
)


def structured(model: nn.Module, data: list[tuple[Tensor, Tensor]], **options: Any) -> nn.Module:
    pruner = MixAndMatchPruner(
        model,
        data[0][0],
        validate=lambda net: 0.5,
        train_data=data,
        config=CONFIG,
        structured=True,
        **options,
    )
    return pruner.step()


@pytest.mark.parametrize("name", ["conv1", "layer1.conv2", "layer3.shortcut", "layer2"])
def test_ignored_layers_keep_their_channels(name: str) -> None:
    """Also where a residual sum couples them with layers that are not ignored."""
    model = SmallResNet().eval()
    pruned = structured(model, DATA, ignored_layers=[model.get_submodule(name)])
    kept = [
        module.weight.shape[0] for module in model.get_submodule(name).modules() if hasattr(module, "weight")
    ]
    found = [
        module.weight.shape[0] for module in pruned.get_submodule(name).modules() if hasattr(module, "weight")
    ]
    assert found == kept
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


class Tokens(nn.Module):
    """Logits for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.order = nn.Parameter(torch.arange(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x[:, self.order]).relu())
        return logits


def test_classes_of_tokens_are_the_last_dimension() -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    data = [(torch.randn(8, 5, 16), torch.randint(4, (8, 5)))]
    pruned = structured(Tokens(), data, loss_fn=loss)
    assert pruned(data[0][0]).shape == (8, 5, 4)
    assert pruned.first.out_features < 32
    assert not pruned.order.requires_grad


def test_a_width_that_forward_has_fixed_is_refused_by_name() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(768, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.first(x.flatten(1)).view(-1, 64))
            return logits

    model = Fixed()
    with pytest.raises(ModelError, match=r"does not run.*ignored_layers"):
        structured(model, DATA)
    assert structured(model, DATA, ignored_layers=[model.first])(DATA[0][0]).shape == (32, 4)


def test_an_empty_layer_is_left_alone() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.none, self.last = nn.Linear(768, 64), nn.Linear(64, 0), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x.flatten(1))
            logits: Tensor = self.last(hidden) + self.none(hidden).sum(1, keepdim=True)
            return logits

    assert structured(Empty(), DATA)(DATA[0][0]).shape == (32, 4)


def test_modules_without_weights_may_stand_among_the_ignored() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    idle = [model[2], model[3]]
    packed = LegoNetPruner(model, DATA[0][0], codebook_size=4, ignored_layers=[*idle, model[4]]).step()
    assert torch.equal(packed[4].weight, model[4].weight)
    assert not torch.equal(packed[1].weight, model[1].weight)
    pruner = MixAndMatchPruner(
        model,
        DATA[0][0],
        validate=lambda net: 0.5,
        train_data=DATA,
        config=CONFIG,
        ignored_layers=[*idle, model[4]],
    )
    pruner.step()
    assert {layer.module for layer in pruner.result.ranges} == {"1"}


def test_customized_pruners_are_given_by_class() -> None:
    model = SmallResNet()
    with pytest.raises(ConfigError, match="give the class"):
        structured(model, DATA, customized_pruners={model.conv1: tp.pruner.function.ConvPruner()})
    assert (
        structured(model, DATA, customized_pruners={nn.Conv2d: tp.pruner.function.ConvPruner()}) is not model
    )
