"""Codebook fine-tuning on what a user may bring: frozen and integer parameters, NaN, loaders with their own state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.errors import TrainingError
from sigmab_plugin.techniques.legonet import LegoNetConfig, PackedModel, finetune_codebook, pack

INPUTS = torch.randn(31, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(31) % 4


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)
        self.order = nn.Parameter(torch.arange(16), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.first(rows[:, self.order])).relu())
        return logits


def tuned(model: nn.Module, data: object, *, epochs: int = 1, lr: float = 0.1) -> PackedModel:
    packed = pack(model, LegoNetConfig(codebook_size=4))
    return finetune_codebook(packed, model, data, epochs=epochs, lr=lr)  # type: ignore[arg-type]


def test_frozen_parameters_keep_their_values() -> None:
    torch.manual_seed(0)
    model = Rows()
    model.norm.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    dense = tuned(model, [(INPUTS, TARGETS)], epochs=2).dense
    state = model.state_dict()
    for name in ("norm.weight", "norm.bias", "first.bias", "order"):
        assert torch.equal(dense[name], state[name]), name
    assert not torch.equal(dense["head.bias"], state["head.bias"])
    assert not torch.equal(dense["norm.running_mean"], state["norm.running_mean"])


@pytest.mark.parametrize(
    ("inputs", "lr", "dtype"),
    [(INPUTS * math.inf, 0.1, torch.float32), (INPUTS, 1e30, torch.float32), (INPUTS, 0.1, torch.float16)],
    ids=["inputs", "divergence", "half precision"],
)
def test_what_is_not_finite_is_refused(inputs: Tensor, lr: float, dtype: torch.dtype) -> None:
    """In half precision the only step gives NaN, and no loss comes after it."""
    torch.manual_seed(0)
    epochs = 1 if dtype is torch.float16 else 3
    with pytest.raises(TrainingError, match=r"legonet: .*(nan|NaN).*finetune_lr"):
        tuned(Rows().to(dtype), [(inputs.to(dtype), TARGETS)], epochs=epochs, lr=lr)


def test_a_batch_of_one_sample_is_refused_with_the_remedy() -> None:
    with pytest.raises(TrainingError, match="drop_last=True"):
        tuned(Rows(), list(zip(INPUTS.split(10), TARGETS.split(10), strict=True)))
    seen: list[int] = []
    model = Rows()
    model.register_forward_pre_hook(lambda _module, arguments: seen.append(len(arguments[0])))
    with pytest.raises(TrainingError, match="BatchNorm 'norm' cannot train"):
        tuned(model, DataLoader(TensorDataset(INPUTS, TARGETS), 10))
    assert seen == [10]  # said before the first step, not after an epoch


def test_the_loaders_own_generator_is_left_as_found() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(INPUTS, TARGETS), 16, shuffle=True, generator=generator)
    model, before = Rows(), generator.get_state()
    everywhere = torch.get_rng_state()
    first = tuned(model, loader)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), everywhere)
    generator.manual_seed(4)
    assert torch.equal(tuned(model, loader).codebook, first.codebook)
