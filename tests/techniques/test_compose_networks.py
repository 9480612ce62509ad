"""Techniques on top of each other, on a network trained on scikit-learn's digits (real images)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import data
from sigmab_plugin.hosts.torch_pruning_section import technique as torch_pruning
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.base import Context, Technique
from sigmab_plugin.techniques.compose import Step, run_sections
from sigmab_plugin.techniques.depth_pruning import AuxiliaryHead
from sigmab_plugin.techniques.depth_pruning import technique as depth_pruning
from sigmab_plugin.techniques.footprint import footprint
from sigmab_plugin.techniques.legonet import technique as legonet
from sigmab_plugin.techniques.mix_and_match import technique as mix_and_match
from sigmab_plugin.techniques.sigmab import technique as sigmab
from sigmab_plugin.tree import SigmaBNet
from sigmab_plugin.tuning import TrainRecipe, evaluate, finetune

pytestmark = pytest.mark.slow
pytest.importorskip("sklearn")

TECHNIQUES: dict[str, Technique] = {
    technique.name: technique for technique in (depth_pruning, torch_pruning, sigmab, mix_and_match, legonet)
}
RECIPE = TrainRecipe(optimizer="adam", lr=5e-3, weight_decay=0.0, warmup_epochs=0.0, label_smoothing=0.0)

DEPTH = {
    "algorithm": "depth_pruning",
    "cut": "block3",
    "epochs": [6],
    "learning_rates": [0.01],
    "freeze": False,
}
PRUNE = {"algorithm": "torch_pruning", "pruning_ratio": 0.25}
TREE = {"algorithm": "sigmab", "levels": ["block2", "block3"], "head": "pool", "projection_dim": 8}
TREE_AFTER_DEPTH = {**TREE, "head": "auxiliary_head"}
MASKS = {
    "algorithm": "mix_and_match",
    "sparsities": [0.5, 0.7],
    "criteria": ["magnitude", "snip"],
    "scores": ["magnitude"],
    "strategies": ["min", "midpoint"],
    "small_layer_parameters": 100,
    "finetune_epochs": 2,
}
CODEBOOK = {
    "algorithm": "legonet",
    "codebook_size": 128,
    "scale": "row",
    "reestimate_batchnorm": True,
    "finetune_epochs": 2,
}
LEAVES = {"algorithm": "depth_pruning", "epochs": [4], "learning_rates": [0.01], "head_widths": [12]}


class Digits:
    """The trained network, its loaders, and networks after shared beginnings."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.train, self.validation, self.test = (
            data.Loader(data.digits(split), batch_size=64, shuffle=split == "train")
            for split in ("train", "val", "test")
        )
        self.dense: nn.Module = DSCNN(10, width=24, blocks=4, input_size=(8, 8))
        self.tune(self.dense, epochs=20)
        self.dense.eval()
        self.calibration = list(self.train)
        self.known: dict[str, nn.Module] = {}

    def tune(self, network: nn.Module, *, epochs: int = 4) -> None:
        finetune(network, self.train, epochs=epochs, recipe=RECIPE, progress=False)

    def accuracy(self, network: nn.Module) -> float:
        return evaluate(network, self.test).accuracy

    def context(self) -> Context:
        return Context(
            example_inputs=self.calibration[0][0][:1],
            calibration_data=self.calibration,
            train_data=self.train,
            validate=lambda network: evaluate(network, self.validation).accuracy,
        )

    def after(self, *sections: dict[str, Any]) -> nn.Module:
        """The network after ``sections``; trees and pruned networks are fine-tuned."""
        network = self.dense
        for count, section in enumerate(sections, start=1):
            key = repr(sections[:count])
            if key not in self.known:
                self.known[key] = run_sections(
                    network, [section], self.context(), techniques=TECHNIQUES, after_step=self._tuned
                )[-1].network
            network = self.known[key]
        return network

    def _tuned(self, step: Step) -> nn.Module:
        if step.algorithm in ("sigmab", "torch_pruning"):
            self.tune(step.network)
        return step.network


@pytest.fixture(scope="module")
def digits() -> Digits:
    made = Digits()
    assert made.accuracy(made.dense) > 0.9
    return made


def is_tree(net: nn.Module) -> None:
    assert isinstance(net, SigmaBNet)


def has_auxiliary_leaves(net: nn.Module) -> None:
    assert isinstance(net, SigmaBNet)
    assert all(isinstance(head, AuxiliaryHead) for head in net.heads.values())


def is_sparse(net: nn.Module) -> None:
    assert footprint(net).form == "sparse"


def is_packed(net: nn.Module) -> None:
    assert footprint(net).form == "codebook"


CASES: dict[str, tuple[tuple[dict[str, Any], ...], Callable[[nn.Module], None], float]] = {
    "depth pruning -> SigmaB": ((DEPTH, TREE_AFTER_DEPTH), is_tree, 0.75),
    "Torch-Pruning -> SigmaB": ((PRUNE, TREE), is_tree, 0.8),
    "SigmaB -> Mix-and-Match": ((TREE, MASKS), is_sparse, 0.7),
    "SigmaB -> LegoNet": ((TREE, CODEBOOK), is_packed, 0.5),
    "SigmaB -> depth-pruned leaves": ((TREE, LEAVES), has_auxiliary_leaves, 0.75),
    "Torch-Pruning -> SigmaB -> Mix-and-Match": ((PRUNE, TREE, MASKS), is_sparse, 0.7),
    "Torch-Pruning -> SigmaB -> depth-pruned leaves -> LegoNet": (
        (PRUNE, TREE, LEAVES, CODEBOOK),
        is_packed,
        0.4,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_composition(digits: Digits, name: str) -> None:
    """Each keeps learning what digits are, reads less per input than it stores, and is smaller than dense."""
    sections, holds, least = CASES[name]
    net = digits.after(*sections)
    holds(net)
    assert digits.accuracy(net) > least
    size, dense = footprint(net), footprint(digits.dense)
    assert size.active < size.stored
    assert size.active < dense.active
    inputs = digits.calibration[0][0][:16]
    with torch.no_grad():
        one_by_one = torch.cat([net(row[None]) for row in inputs])
        assert torch.allclose(net(inputs), one_by_one, atol=1e-4)


def test_masks_and_codebooks_leave_the_tree_as_it_was(digits: Digits) -> None:
    tree = digits.after(TREE)
    before = {name: tensor.clone() for name, tensor in tree.state_dict().items()}
    for section in (MASKS, CODEBOOK, LEAVES):
        digits.after(TREE, section)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tree.state_dict().items())
    assert all(
        isinstance(head, nn.Module) and not isinstance(head, AuxiliaryHead) for head in tree.heads.values()
    )


def test_pruned_leaves_keep_the_routing(digits: Digits) -> None:
    tree, short = digits.after(TREE), digits.after(TREE, LEAVES)
    inputs = digits.calibration[0][0]
    assert torch.equal(tree.route(inputs), short.route(inputs))
    assert short.macs(inputs[:1]).active < tree.macs(inputs[:1]).active
