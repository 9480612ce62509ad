"""Training of the auxiliary head: Adam in stages of falling learning rate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...counting import as_arguments
from ...errors import CalibrationError
from ...tuning.lone_sample import has_lone_sample, lone_sample_refused
from ...tuning.seeding import loader_left_as_found, preserve_random_state, seed_epoch
from .config import DepthPruningConfig
from .network import DepthPrunedNet

logger = logging.getLogger(__name__)

Loss = Callable[[Any, Any], torch.Tensor]


def train(
    net: DepthPrunedNet,
    train_data: Iterable[Any],
    config: DepthPruningConfig,
    *,
    loss_fn: Loss | None = None,
) -> list[float]:
    """Train ``net`` in place and leave it in eval mode.

    Data order and dropout are functions of (``config.seed``, epoch).

    Args:
        train_data: re-iterable of ``(inputs, targets)``; one pass is one epoch.
        config: epochs and learning rates per stage, frozen kept layers or not, cached features or not.
        loss_fn: ``loss_fn(logits, targets)``; cross-entropy where absent.

    Returns:
        The mean loss of every epoch.

    Raises:
        CalibrationError: no data, one-shot data, or a loss that is not finite.
        TrainingError: a batch of one sample before a BatchNorm that gets one value per channel of it.
    """
    criterion = loss_fn if loss_fn is not None else nn.functional.cross_entropy
    net.freeze(config.freeze)
    trained: nn.Module = net
    data = train_data
    if config.cache_features:
        trained = net.head
        data = _CachedFeatures(net, train_data, config.seed)

    def loss(inputs: tuple[Any, ...], targets: Any) -> torch.Tensor:
        return criterion(trained(*inputs), targets)

    return run_stages(net, data, config, loss=loss, training_mode=net.train)


def run_stages(
    net: nn.Module,
    data: Iterable[Any],
    config: DepthPruningConfig,
    *,
    loss: Callable[[tuple[Any, ...], Any], torch.Tensor],
    training_mode: Callable[[], Any],
) -> list[float]:
    """Adam over the parameters of ``net`` that ask for a gradient, stage after stage; eval mode afterwards."""
    device = device_of(net)
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    losses: list[float] = []
    with preserve_random_state(), loader_left_as_found(data):
        for epochs, rate in zip(config.epochs, config.learning_rates, strict=True):
            optimizer = torch.optim.Adam(parameters, lr=rate)
            for _ in range(epochs):
                seed_epoch(data, seed=config.seed, epoch=len(losses))
                training_mode()
                losses.append(_one_epoch(net, data, optimizer, loss, device))
                logger.debug("depth pruning: epoch %d, loss %.4f", len(losses), losses[-1])
    net.eval()
    return losses


def device_of(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _one_epoch(
    net: nn.Module,
    data: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[tuple[Any, ...], Any], torch.Tensor],
    device: torch.device,
) -> float:
    total, samples = 0.0, 0
    lone_sample = has_lone_sample(data)
    for inputs, targets in data:
        arguments = tuple(_to(argument, device) for argument in as_arguments(inputs))
        targets = _to(targets, device)
        with lone_sample_refused(net, len(targets), ahead=lone_sample and not samples):
            loss = loss_of(arguments, targets)
        if not torch.isfinite(loss):
            raise CalibrationError(
                f"depth pruning: the loss became {loss.item()}; check the inputs for NaN or lower learning_rates"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(targets)
        samples += len(targets)
    if samples == 0:
        raise CalibrationError(
            "depth pruning: train_data gave no batch; pass a re-iterable of (inputs, targets) such as a DataLoader"
        )
    return total / samples


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if hasattr(value, "to") else value


class _CachedFeatures:
    """What the frozen layers give for the data, once; every epoch is shuffled anew."""

    def __init__(self, net: DepthPrunedNet, data: Iterable[Any], seed: int) -> None:
        kept, device = net.kept().eval(), device_of(net)
        features, targets = [], []
        with torch.no_grad(), preserve_random_state(), loader_left_as_found(data):
            seed_epoch(data, seed=seed, epoch=0)
            for inputs, labels in data:
                features.append(kept(*[_to(argument, device) for argument in as_arguments(inputs)]))
                targets.append(_to(labels, device))
        if not features:
            raise CalibrationError("depth pruning: train_data gave no batch; pass (inputs, targets) batches")
        self.batch_size = len(features[0])
        self.features, self.targets = torch.cat(features), torch.cat(targets)
        self._order = torch.Generator().manual_seed(seed)
        # BatchNorm has no variance of a single value per channel.
        one_value = bool(net.head.widths) and self.features.shape[2:].numel() == 1
        self.drop_lone = one_value and min(self.batch_size, len(self.features)) > 1
        if self.drop_lone and len(self.features) % self.batch_size == 1:
            logger.info(
                "depth pruning: %d samples in batches of %d leave one over, on whose 1x1 map BatchNorm cannot train: "
                "each epoch leaves another sample out",
                len(self.features),
                self.batch_size,
            )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.features), generator=self._order).to(self.features.device)
        for chosen in order.split(self.batch_size):
            if len(chosen) > 1 or not self.drop_lone:
                yield self.features[chosen], self.targets[chosen]
