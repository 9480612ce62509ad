"""Bytes in the form in which a network is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from sigmab_plugin import SigmaBPruner
from sigmab_plugin.counting import storage_bytes
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.report.counts import net_row
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.footprint import effective_tensors, footprint, sparse_bytes
from sigmab_plugin.techniques.legonet import LegoNetConfig
from sigmab_plugin.techniques.legonet import technique as legonet


class Mask(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def tree() -> tuple[nn.Module, torch.Tensor]:
    clips = torch.randn(32, 1, 16, 6)
    model = DSCNN(3, width=8, blocks=3, input_size=(16, 6)).eval()
    options = {"levels": ["block2", "block3"], "head": "pool", "projection_dim": 4}
    return SigmaBPruner(model, clips[:1], calibration_data=clips.split(16), **options).step(), clips[:1]


def test_a_dense_network_is_counted_as_it_lies_in_memory() -> None:
    """Zeros in biases and running means do not count as sparsity."""
    model = DSCNN(3, width=8, blocks=1, input_size=(16, 6))
    nn.init.zeros_(model.fc.bias)
    size = footprint(model)
    assert size.stored == size.active == storage_bytes(model)
    assert size.form == "dense"


def test_a_tree_counts_its_largest_path() -> None:
    net, example = tree()
    row = net_row("tree", net, example)
    size = footprint(net)
    assert (size.active, size.stored, size.form) == (row.active_bytes, row.stored_bytes, "dense")
    assert size.active < size.stored


def test_masks_count_once_as_bits_and_values() -> None:
    layer = nn.Linear(16, 8, bias=False)
    mask = torch.zeros(8, 16)
    mask[:, :4] = 1
    parametrize.register_parametrization(layer, "weight", Mask(mask))
    assert [name for name, _ in effective_tensors(layer)] == ["weight"]
    size = footprint(layer)
    assert size.stored == 8 * 16 // 8 + 8 * 4 * 4
    assert size.form == "sparse"


def test_a_shared_tensor_counts_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert footprint(nn.Sequential(first, second)).stored == 64


@pytest.mark.parametrize("layers", [6, 12])
def test_every_masked_layer_counts(layers: int) -> None:
    """The masked weight is made anew at each look at it, at an address that the one before may have had."""
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(layers)))
    for layer in net:
        parametrize.register_parametrization(layer, "weight", Mask((torch.rand(16, 16) > 0.5).float()))
    assert [name for name, _ in effective_tensors(net)] == [f"{index}.weight" for index in range(layers)]
    assert footprint(net).stored == footprint(remove_masks_of(net)).stored


def remove_masks_of(net: nn.Sequential) -> nn.Sequential:
    for layer in net:
        parametrize.remove_parametrizations(layer, "weight")
    return net


def test_a_tied_masked_weight_counts_once() -> None:
    mask = torch.zeros(4, 4)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    for layer in (first, second):
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    assert footprint(nn.Sequential(first, second)).stored == 2
    normed = [weight_norm(nn.Linear(4, 4, bias=False)) for _ in range(2)]
    assert footprint(nn.Sequential(*normed)).stored == 128
    for name in ("original0", "original1"):
        setattr(normed[1].parametrizations.weight, name, getattr(normed[0].parametrizations.weight, name))
    assert footprint(nn.Sequential(*normed)).stored == 64


def test_a_codebook_counts_once_and_indices_by_their_bits() -> None:
    net, example = tree()
    packed = legonet.apply(net, LegoNetConfig(codebook_size=16), Context(example_inputs=example))
    size = footprint(packed)
    assert size.form == "codebook"
    indices = sum(entry.index.numel() for entry in packed.legonet.tensors.values())
    dense = sum(tensor.numel() * tensor.element_size() for tensor in packed.legonet.dense.values())
    assert size.stored == indices + dense + 16 * 16 * 4
    assert size.active < size.stored < footprint(net).stored


def test_weights_that_left_their_codebook_count_as_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    net = legonet.apply(model, LegoNetConfig(codebook_size=4), Context())
    packed = footprint(net)
    with torch.no_grad():
        net[0].weight += 0.1
    partly = footprint(net)
    assert (packed.form, partly.form) == ("codebook", "codebook")
    assert partly.stored == packed.stored + 16 * 64 * 4 - net.legonet.tensors["0.weight"].index.numel()
    with torch.no_grad():
        net[2].weight += 0.1
    trained = footprint(net)
    assert (trained.stored, trained.form) == (storage_bytes(model), "dense")


@pytest.mark.parametrize(("zeros", "expected"), [(0, 2 + 64), (16, 2), (8, 2 + 32)])
def test_sparse_form(zeros: int, expected: int) -> None:
    values = torch.ones(16)
    values[:zeros] = 0
    assert sparse_bytes(values) == expected
