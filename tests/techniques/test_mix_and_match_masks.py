"""Masks held in a model, and their file: refused as a whole, or carried out as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from sigmab_plugin.errors import FormatError, ModelError
from sigmab_plugin.techniques.mix_and_match import load_masks, parametrize_masks, remove_masks

KEEP = {"0.weight": torch.arange(16).reshape(4, 4) % 2 == 0}


@pytest.mark.parametrize("wrong", ["nowhere.weight", "1.weight_ih_l0"])
def test_masks_that_do_not_fit_leave_the_model_as_it_was(wrong: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    names = list(model.state_dict())
    with pytest.raises(ModelError):
        parametrize_masks(model, {**KEEP, wrong: torch.ones(12, 4, dtype=torch.bool)})
    assert list(model.state_dict()) == names


def test_other_parametrizations_are_not_lost_with_the_masks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parametrize_masks(model, {**KEEP, "1.weight": torch.ones(4, 4, dtype=torch.bool)})
    spectral_norm(model[1])
    with pytest.raises(ModelError, match=r"'1' is parametrized by _SpectralNorm"):
        remove_masks(model)
    assert all(parametrize.is_parametrized(layer) for layer in model)


@pytest.mark.parametrize("values", [torch.randn(4, 4), torch.full((4, 4), 2, dtype=torch.uint8)])
def test_a_file_of_something_else_holds_no_masks(values: torch.Tensor, tmp_path: Path) -> None:
    save_file({"0.weight": values}, tmp_path / "weights")
    with pytest.raises(FormatError, match=r"holds no masks: '0.weight'"):
        load_masks(tmp_path / "weights")
