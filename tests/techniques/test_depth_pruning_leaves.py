"""Depth pruning inside a SigmaB tree: shorter leaves, the same routing, files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBNet, SigmaBPruner, load, save
from sigmab_plugin.cli import main
from sigmab_plugin.deploy import Runner, export
from sigmab_plugin.errors import ConfigError, FormatError, ModelError
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.depth_pruning import (
    AuxiliaryHead,
    DepthPruningConfig,
    prune_leaves,
    technique,
    train_leaf_heads,
)
from sigmab_plugin.tree.io import assemble
from sigmab_plugin.tree.plan import Plan

CLIPS = torch.randn(64, 1, 16, 6, generator=torch.Generator().manual_seed(0))
TARGETS = (CLIPS.mean((1, 2, 3)) > 0).long() + (CLIPS[:, 0, :, 0].mean(1) > 0).long()


def dense() -> DSCNN:
    return DSCNN(3, width=12, blocks=4, input_size=(16, 6)).eval()


def tree(**changes: Any) -> SigmaBNet:
    options = {"levels": ["block2", "block3"], "head": "pool", "projection_dim": 4, **changes}
    return SigmaBPruner(dense(), CLIPS[:1], calibration_data=CLIPS.split(16), **options).step()


@pytest.mark.parametrize("cut", ["", "block3", "block3.dw_relu", "block4"])
def test_every_leaf_gets_a_head_of_its_own(cut: str) -> None:
    net = tree()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    short = prune_leaves(net, CLIPS[:1], cut=cut, head_widths=(6,))
    assert isinstance(short, SigmaBNet)
    assert all(isinstance(head, AuxiliaryHead) for head in short.heads.values())
    assert len({head.fc.weight.data_ptr() for head in short.heads.values()}) == 4
    assert torch.equal(short.route(CLIPS), net.route(CLIPS))
    assert (sum(p.numel() for p in short.specializers["0_0"].parameters()) == 0) == (cut == "")
    for routing in ("hard", "soft"):
        short.routing = routing
        assert short(CLIPS).shape == (64, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_heads_train_and_the_rest_stays() -> None:
    short = prune_leaves(tree(), CLIPS[:1], head_widths=(6,))
    flags = [parameter.requires_grad for parameter in short.parameters()]
    before = {name: tensor.clone() for name, tensor in short.state_dict().items()}
    config = DepthPruningConfig(epochs=(8,), learning_rates=(0.02,))
    losses = train_leaf_heads(short, [(CLIPS, TARGETS)], config)
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in short.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("heads.") for name in changed)
    assert [parameter.requires_grad for parameter in short.parameters()] == flags
    assert not short.training


def test_without_freezing_the_whole_tree_trains() -> None:
    config = DepthPruningConfig(epochs=(1,), learning_rates=(0.02,), freeze=False, head_widths=(6,))
    net = tree()
    short = technique.apply(net, config, Context(example_inputs=CLIPS[:1], train_data=[(CLIPS, TARGETS)]))
    assert not torch.equal(short.backbone.stem.conv.weight, net.backbone.stem.conv.weight)


def test_the_options_hold_on_a_tree_or_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    net, config = tree(), DepthPruningConfig(epochs=(1,), learning_rates=(0.02,), head_widths=(6,))
    inputs = CLIPS[:1]
    with caplog.at_level(logging.INFO, "sigmab_plugin"):
        first, other = (
            technique.apply(net, config.replace(seed=seed), Context(example_inputs=inputs)) for seed in (0, 7)
        )
    assert "no train_data" in caplog.text
    assert not torch.equal(first.heads["0_0"].fc.weight, other.heads["0_0"].fc.weight)
    for changes in ({"num_classes": 9}, {"cache_features": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} has no meaning on a SigmaB net"):
            technique.apply(net, config.replace(**changes), Context(example_inputs=inputs))


def test_heads_train_with_the_loss_that_is_given() -> None:
    """In soft routing, where every leaf learns from every sample."""
    net, seen = tree(), []

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(logits.shape))
        return nn.functional.cross_entropy(logits, targets)

    config = DepthPruningConfig(epochs=(2,), learning_rates=(0.02,), head_widths=(6,))
    context = Context(example_inputs=CLIPS[:1], train_data=[(CLIPS, TARGETS)], loss_fn=loss)
    short = technique.apply(net, config, context)
    assert seen == [(64, 3)] * 2
    assert short.routing == "auto"
    untrained = prune_leaves(net, CLIPS[:1], head_widths=(6,))
    for key, head in short.heads.items():
        assert not torch.equal(head.fc.weight, untrained.heads[key].fc.weight), key


@pytest.mark.parametrize("cut", ["", "block3"])
def test_save_and_load_are_bitwise(cut: str, tmp_path: Path) -> None:
    short = prune_leaves(tree(), CLIPS[:1], cut=cut, head_widths=(6,), seed=3)
    save(short, tmp_path)
    with torch.device("meta"):
        skeleton = dense()
    for model in (dense(), skeleton):
        again = load(tmp_path, model)
        assert torch.equal(again(CLIPS), short(CLIPS))
        assert again.plan == short.plan
        assert again.parameter_counts() == short.parameter_counts()
    assert Plan.from_dict(json.loads(json.dumps(short.plan.to_dict()))) == short.plan
    save(again, tmp_path / "again")
    assert (tmp_path / "again" / "plan.json").read_text() == (tmp_path / "plan.json").read_text()


def test_a_saved_tree_is_inspected_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = prune_leaves(tree(), CLIPS[:1], head_widths=(6,))
    save(short, tmp_path / "tree")
    assert main(["inspect", str(tmp_path / "tree"), "--json"]) == 0
    values = [node["values"] for node in json.loads(capsys.readouterr().out)["nodes"]]
    assert sum(values) == short.parameter_counts().total
    export(short, CLIPS[:2], tmp_path / "bundle", format="torch")
    with Runner(tmp_path / "bundle") as runner:
        result = runner.run(CLIPS[:1].numpy())
    torch.testing.assert_close(torch.as_tensor(result.logits), short(CLIPS[:1]))


def test_an_altered_plan_is_refused(tmp_path: Path) -> None:
    plan = prune_leaves(tree(), CLIPS[:1], cut="block3", head_widths=(6,)).plan
    record = plan.to_dict()
    with pytest.raises(FormatError, match="incomplete or altered"):
        Plan.from_dict({**record, "shortened": {"cut": "block3"}})
    with pytest.raises(ConfigError, match="no cut after 'block9'"):
        assemble(Plan.from_dict({**record, "shortened": {**record["shortened"], "cut": "block9"}}), dense())


def test_bad_input() -> None:
    net = tree()
    with pytest.raises(ConfigError, match=r"no cut after 'block9'.*block3"):
        prune_leaves(net, CLIPS[:1], cut="block9")
    with pytest.raises(ModelError, match="shortened already"):
        prune_leaves(prune_leaves(net, CLIPS[:1]), CLIPS[:1])
    dims = zip((8, 16, 16, 16), (16, 16, 16, 3), strict=True)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in dims))
    rows = torch.randn(32, 8)
    options: dict[str, Any] = {"levels": ["1", "2"], "head": "3", "projection_dim": 4}
    vectors = SigmaBPruner(layers, rows[:1], calibration_data=[rows], **options).step()
    with pytest.raises(ModelError, match="needs a 2-D feature map"):
        prune_leaves(vectors, rows[:1])
