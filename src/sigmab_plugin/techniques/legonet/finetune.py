"""Training the codebook through the weights that are made from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import ModelError, TrainingError
from ...tuning.batches import sample_count
from ...tuning.lone_sample import has_lone_sample, lone_sample_refused
from ...tuning.seeding import loader_left_as_found, preserve_random_state, seed_epoch
from ..supervised import LossFunction, module_device, supervised_batches, training_loss
from .bits import bits_per_index, pack_bits
from .kmeans import assign
from .packed import PackedModel, PackedTensor, assemble, expand_into, scaled_blocks

logger = logging.getLogger(__name__)

_LATENT_SPEED = 0.03
_DENSE_SPEED = 0.1


class CodebookWeight(nn.Module):
    """Parametrization ``weight = codebook[index] * scale``.

    The gradient scatters to the codebook (shared by all weights) and to the scale. The original
    parameter becomes the latent weight: with ``straight_through`` it receives the weight's gradient
    unchanged, and :meth:`reassign` moves blocks to the codebook entry now nearest to it.
    """

    index: Tensor

    def __init__(
        self, codebook: nn.Parameter, entry: PackedTensor, block_size: int, *, straight_through: bool = False
    ) -> None:
        super().__init__()
        self.codebook = codebook
        self.shape = entry.shape
        self.block_size = block_size
        self.straight_through = straight_through
        self.register_buffer("index", entry.indices(block_size, codebook.shape[0]))
        self.scale = None if entry.scale is None else nn.Parameter(entry.scale.clone())

    def forward(self, latent: Tensor) -> Tensor:
        blocks = nn.functional.embedding(self.index, self.codebook)
        weight = assemble(blocks, self.shape, self.block_size, self.scale).to(latent.dtype)
        return weight + (latent - latent.detach()) if self.straight_through else weight

    @torch.no_grad()
    def reassign(self, latent: Tensor) -> int:
        """Give every block of ``latent`` its nearest codebook entry; returns how many changed."""
        scale = None if self.scale is None else self.scale.cpu()
        if scale is not None:
            scale = torch.where(scale.abs() > 0, scale, 1.0)
        index, _ = assign(scaled_blocks(latent, scale, self.block_size), self.codebook.detach().cpu())
        index = index.to(self.index.device)
        changed = int((index != self.index).sum())
        self.index.copy_(index)
        return changed


@preserve_random_state()
def finetune_codebook(
    packed: PackedModel,
    model: nn.Module,
    train_data: Iterable[Any],
    *,
    epochs: int,
    lr: float = 0.1,
    dense: bool = True,
    assignments: bool = False,
    loss_fn: LossFunction | None = None,
    device: torch.device | str | None = None,
) -> PackedModel:
    """Train codebook and scales (Adam, cosine schedule by epoch); the file keeps its size.

    Data order and dropout are functions of (the seed in ``packed.config``, epoch). What is stored dense and asks
    for no gradient keeps its values; a frozen weight that is packed follows the codebook like the others.

    Args:
        packed: from :func:`~sigmab_plugin.techniques.legonet.pack`.
        model: the dense model, left as it was. Its weights matter with ``assignments`` only, as the
            latent weights' start; otherwise any module of the same architecture will do.
        train_data: re-iterable of ``(inputs, targets)``.
        epochs: passes over ``train_data``.
        lr: first step as a share of the root mean square of what is stepped (codebook, scales).
        dense: train what is stored dense as well (biases, normalisation).
        assignments: straight-through training of latent weights, whose blocks are reassigned after
            every epoch of the first half; the rest settles what stays dense, running statistics included.
        loss_fn: ``loss_fn(outputs, targets)``; by default a tree's own loss or cross-entropy.
        device: where to train; by default where ``model`` is.

    Raises:
        CalibrationError: no training data.
        ModelError: a packed weight belongs to a recurrent layer, which cannot be parametrized.
        TrainingError: the loss or a weight became NaN or infinite, or BatchNorm got a batch of one sample.
    """
    place = torch.device(device) if device is not None else module_device(model)
    net = expand_into(packed, model).to(place)
    codebook = nn.Parameter(packed.codebook.to(place, copy=True))
    for parameter in net.parameters():
        parameter.requires_grad_(dense and parameter.requires_grad)
    made = _parametrize(net, packed, codebook, assignments)
    if assignments:
        dense_weights = model.state_dict()
        for name, latent in _latents(net, packed).items():
            latent.data.copy_(dense_weights[name])
    optimizer = torch.optim.Adam(_parameter_groups(net, _latents(net, packed), codebook, made, lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    with loader_left_as_found(train_data):
        for epoch in range(epochs):
            seed_epoch(train_data, seed=packed.config.seed, epoch=epoch)
            loss = _epoch(net, optimizer, train_data, loss_fn, codebook.device)
            schedule.step()
            changed = 0
            if assignments and epoch + 1 <= epochs // 2:
                changed = sum(made[name].reassign(latent) for name, latent in _latents(net, packed).items())
            logger.info("legonet: epoch %d, loss %.4f, %d blocks reassigned", epoch + 1, loss, changed)
    return _repack(net, packed, codebook, made)


def _epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_data: Iterable[Any],
    loss_fn: LossFunction | None,
    device: torch.device,
) -> float:
    """One pass over the training data; returns the mean loss."""
    net.train()
    losses: list[float] = []
    lone_sample = has_lone_sample(train_data)
    for inputs, targets in supervised_batches(train_data, device, name="train_data"):
        ahead = lone_sample and not losses
        samples = sample_count(inputs) if ahead else 0
        with parametrize.cached(), lone_sample_refused(net, samples, ahead=ahead):
            loss = training_loss(net, inputs, targets, loss_fn)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise _not_finite(f"the loss became {losses[-1]}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    # The last step of all has no loss after it.
    if not all(torch.isfinite(p).all() for group in optimizer.param_groups for p in group["params"]):
        raise _not_finite("a step gave weights that are NaN or infinite")
    return sum(losses) / len(losses)


def _not_finite(what: str) -> TrainingError:
    return TrainingError(
        f"legonet: {what}; check the inputs for NaN, lower finetune_lr, or fine-tune in float32 or bfloat16"
    )


def _parameter_groups(
    net: nn.Module,
    latents: dict[str, Tensor],
    codebook: nn.Parameter,
    made: dict[str, CodebookWeight],
    lr: float,
) -> list[dict[str, Any]]:
    """Steps of codebook, scales and latent weights are relative to their size: Adam's are absolute."""
    relative: dict[int, tuple[Tensor, float]] = {
        id(p): (p, 1.0) for p in (codebook, *(m.scale for m in made.values() if m.scale is not None))
    }
    # Latent weights move slowly: each block that changes its entry is a jump for the network.
    relative.update({id(p): (p, _LATENT_SPEED) for p in latents.values() if p.requires_grad})
    groups = [
        {"params": [p], "lr": lr * speed * float(p.detach().square().mean().sqrt())}
        for p, speed in relative.values()
    ]
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in relative]
    return [*groups, {"params": others, "lr": _DENSE_SPEED * lr}] if others else groups


def _owner(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, tensor = name.rpartition(".")
    return net.get_submodule(path), tensor


def _parametrize(
    net: nn.Module, packed: PackedModel, codebook: nn.Parameter, straight_through: bool
) -> dict[str, CodebookWeight]:
    made: dict[str, CodebookWeight] = {}
    latents: dict[str, Any] = {}
    names = {
        **{n: n for n in packed.tensors},
        **{a: n for a, n in packed.aliases.items() if n in packed.tensors},
    }
    for name, stored in names.items():
        owner, tensor = _owner(net, name)
        if isinstance(owner, nn.RNNBase):
            raise ModelError(f"{name} belongs to a recurrent layer; put it into ignored_layers to fine-tune")
        if "parametrizations" in name.split("."):
            raise ModelError(
                f"{name} is parametrized already; call parametrize.remove_parametrizations first"
            )
        if stored not in made:
            made[stored] = CodebookWeight(
                codebook, packed.tensors[stored], packed.config.block_size, straight_through=straight_through
            ).to(codebook.device)
        # unsafe: the codebook is set from outside, so a round trip through right_inverse has no meaning.
        parametrize.register_parametrization(owner, tensor, made[stored], unsafe=True)
        entry: Any = owner.parametrizations[tensor]  # type: ignore[index,union-attr]
        if stored in latents:
            entry.original = latents[stored]
        latents[stored] = entry.original
        entry.original.requires_grad_(straight_through)
    return made


def _latents(net: nn.Module, packed: PackedModel) -> dict[str, Tensor]:
    found = {}
    for name in packed.tensors:
        owner, tensor = _owner(net, name)
        found[name] = owner.parametrizations[tensor].original  # type: ignore[index,union-attr]
    return found


def _repack(
    net: nn.Module, packed: PackedModel, codebook: nn.Parameter, made: dict[str, CodebookWeight]
) -> PackedModel:
    bits = bits_per_index(codebook.shape[0])
    tensors = {}
    for name, entry in packed.tensors.items():
        scale = made[name].scale
        tensors[name] = PackedTensor(
            shape=entry.shape,
            dtype=entry.dtype,
            index=pack_bits(made[name].index, bits),
            scale=None if scale is None else scale.detach().cpu().clone(),
        )
    trained = PackedModel(
        packed.config, codebook.detach().cpu().clone(), tensors, packed.dense, packed.aliases
    )
    return trained.with_dense(net)
