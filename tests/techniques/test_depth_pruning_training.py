"""Training of the auxiliary head: seeds, loaders with their own state, lone samples, frozen parameters."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.errors import TrainingError
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.depth_pruning import DepthPruningConfig, apply, depth_prune, train

IMAGES = torch.randn(17, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(17) % 4
CONFIG = DepthPruningConfig(cut="second", epochs=(2, 1), learning_rates=(1e-2, 1e-3), head_widths=(4,))


class Net(nn.Module):
    """Two blocks with dropout; with ``stride`` 8 their maps are 1 x 1."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, stride, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.second(self.first(images)).mean((2, 3)))
        return logits


def shuffled(batch_size: int = 5, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(IMAGES, TARGETS), batch_size, shuffle=True, **options)


def trained(model: nn.Module, data: Any, config: DepthPruningConfig) -> dict[str, Tensor]:
    net = depth_prune(model, IMAGES, cut="second", head_widths=config.head_widths, seed=0)
    train(net, data, config)
    return net.state_dict()


@pytest.mark.parametrize("options", [{}, {"freeze": False}, {"cache_features": True}])
def test_order_and_dropout_are_functions_of_the_seed(options: dict[str, bool]) -> None:
    model = Net()
    found = []
    for world, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(world)
        before = torch.get_rng_state()
        found.append(trained(model, shuffled(), CONFIG.replace(seed=seed, **options)))
        assert torch.equal(torch.get_rng_state(), before)
    first, same, other = found
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("options", [{}, {"cache_features": True}])
def test_the_loaders_own_generator_is_left_as_found(options: dict[str, bool]) -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    trained(Net(), shuffled(generator=generator), CONFIG.replace(**options))
    assert torch.equal(generator.get_state(), before)


def test_a_batch_of_one_sample_is_refused_with_the_remedy() -> None:
    model = Net(stride=8)
    batches = list(zip(IMAGES.split(8), TARGETS.split(8), strict=True))
    with pytest.raises(TrainingError, match="drop_last=True"):
        trained(model, batches, CONFIG)
    with pytest.raises(
        TrainingError, match=r"BatchNorm 'auxiliary_head\.stages\.stage1\.dw_bn' cannot train"
    ):
        trained(model, shuffled(8), CONFIG)
    assert trained(Net(), shuffled(8), CONFIG)
    assert trained(model, shuffled(8), CONFIG.replace(head_widths=()))


@pytest.mark.parametrize(
    ("stride", "head_widths", "used"),
    [(1, (4,), 17), (8, (4,), 16), (8, (), 17)],
    ids=["map", "1x1", "no stages"],
)
def test_cached_features_leave_out_only_what_cannot_train(
    stride: int, head_widths: tuple[int, ...], used: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.replace(cache_features=True, head_widths=head_widths)
    net = depth_prune(Net(stride), IMAGES, cut="second", head_widths=head_widths)
    seen: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return nn.functional.cross_entropy(logits, targets)

    with caplog.at_level(logging.INFO, "sigmab_plugin"):
        train(net, shuffled(8), config, loss_fn=loss)
    assert sum(seen) == 3 * used
    assert ("each epoch leaves another sample out" in caplog.text) == (used == 16)


def test_cached_features_of_single_samples_are_refused_with_the_remedy() -> None:
    with pytest.raises(TrainingError, match="a batch size that leaves no batch of one sample"):
        trained(Net(stride=8), shuffled(1), CONFIG.replace(cache_features=True))


@pytest.mark.parametrize("freeze", [True, False])
def test_what_the_user_froze_stays_frozen(freeze: bool) -> None:
    model = Net()
    model.first.requires_grad_(False)
    net = apply(
        model, CONFIG.replace(freeze=freeze), Context(example_inputs=IMAGES, train_data=[(IMAGES, TARGETS)])
    )
    assert torch.equal(net.first[0].weight, model.first[0].weight)
    assert torch.equal(net.first[1].bias, model.first[1].bias)
    assert torch.equal(net.second[0].weight, model.second[0].weight) is freeze
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"first.{name}" for name, _ in model.first.named_parameters()}
