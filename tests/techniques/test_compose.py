"""Order of techniques: what is refused, what is proposed, and carrying a list of sections out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from sigmab_plugin.errors import ConfigError
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.techniques.base import Context, Technique
from sigmab_plugin.techniques.compose import (
    Step,
    check_order,
    order_problems,
    parse_sections,
    run_sections,
    sensible_order,
)
from sigmab_plugin.techniques.depth_pruning import technique as depth_pruning

NAMES = ("depth_pruning", "torch_pruning", "sigmab", "mix_and_match", "legonet", "quantization")


@pytest.mark.parametrize(
    "order",
    [
        (),
        ("sigmab",),
        ("depth_pruning", "sigmab"),
        ("torch_pruning", "sigmab"),
        ("torch_pruning", "torch_pruning"),
        ("sigmab", "mix_and_match"),
        ("sigmab", "legonet"),
        ("sigmab", "depth_pruning"),
        ("depth_pruning", "sigmab", "depth_pruning"),
        ("torch_pruning", "sigmab", "mix_and_match"),
        ("depth_pruning", "torch_pruning", "sigmab", "magnitude_sparsity", "quantization"),
        (
            "magnitude_sparsity",
            "sigmab",
            "quantization",
        ),  # carried out and fixed in the weights before the tree
        ("something_else", "sigmab", "something_else"),
    ],
)
def test_sensible_orders_are_accepted(order: tuple[str, ...]) -> None:
    check_order(order)
    assert sensible_order(order) == order


@pytest.mark.parametrize(
    ("order", "proposal"),
    [
        (("quantization", "depth_pruning"), "depth_pruning -> quantization"),
        (("quantization", "sigmab"), "sigmab -> quantization"),
        (("legonet", "sigmab"), "sigmab -> legonet"),
        (("legonet", "torch_pruning", "sigmab"), "torch_pruning -> sigmab -> legonet"),
        (("mix_and_match", "sigmab"), "sigmab -> mix_and_match"),
        (("sigmab", "torch_pruning"), "torch_pruning -> sigmab"),
        (("rb_sparsity", "sigmab"), "sigmab -> rb_sparsity"),
        (("mix_and_match", "depth_pruning", "sigmab"), "depth_pruning -> sigmab -> mix_and_match"),
        (("weight_compression", "mix_and_match"), "mix_and_match -> weight_compression"),
        (
            ("depth_pruning", "sigmab", "legonet", "depth_pruning"),
            "depth_pruning -> sigmab -> depth_pruning -> legonet",
        ),
    ],
)
def test_a_wrong_order_is_refused_with_the_sensible_one(order: tuple[str, ...], proposal: str) -> None:
    with pytest.raises(ConfigError, match=f"Sensible order: {proposal}"):
        check_order(order)
    check_order(proposal.split(" -> "))


@pytest.mark.parametrize(
    "order",
    [
        ("sigmab", "sigmab"),
        ("depth_pruning", "depth_pruning"),
        ("legonet", "legonet"),
        ("mix_and_match", "legonet"),
        ("legonet", "mix_and_match"),
        ("legonet", "magnitude_sparsity"),
        ("legonet", "rb_sparsity"),
        ("legonet", "movement_sparsity"),
        ("magnitude_sparsity", "legonet"),
        ("movement_sparsity", "legonet"),
        ("mix_and_match", "magnitude_sparsity"),
        ("magnitude_sparsity", "mix_and_match"),
        ("rb_sparsity", "mix_and_match"),
        ("mix_and_match", "movement_sparsity"),
        ("legonet", "quantization"),
        ("quantization", "weight_compression"),
    ],
)
def test_what_excludes_each_other_gets_no_proposal(order: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_order(order)
    assert "Sensible order" not in str(refusal.value)
    assert repr(order[0]) in str(refusal.value)


def test_every_proposal_is_accepted_and_complete() -> None:
    """Over all orders of up to four algorithms: a proposal breaks no rule and drops nothing."""
    for length in range(1, 5):
        for order in itertools.product(NAMES, repeat=length):
            problems = order_problems(order)
            for problem in problems:
                assert not order_problems(problem.proposal)
                assert not problem.proposal or sorted(problem.proposal) == sorted(order)
            if not problems:
                assert sensible_order(order) == order


def context() -> Context:
    return Context(example_inputs=torch.randn(2, 1, 16, 6))


def small() -> nn.Module:
    return DSCNN(3, width=8, blocks=3, input_size=(16, 6)).eval()


TECHNIQUES: dict[str, Technique] = {"depth_pruning": depth_pruning}


def test_sections_run_in_order_and_the_model_stays() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[str] = []

    def after(step: Step) -> nn.Module:
        seen.append(step.algorithm)
        return nn.Sequential(step.network)

    steps = run_sections(
        model,
        [{"algorithm": "depth_pruning", "cut": "block2"}],
        context(),
        techniques=TECHNIQUES,
        after_step=after,
    )
    assert seen == ["depth_pruning"]
    assert isinstance(steps[-1].network, nn.Sequential)
    assert steps[-1].seconds > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([{}], "no 'algorithm'"),
        ([{"algorithm": "depth"}], "unknown algorithm 'depth'; known: depth_pruning"),
        ([{"algorithm": "depth_pruning", "cuts": "block1"}], "Did you mean 'cut'"),
        (
            [
                {"algorithm": "depth_pruning", "cut": "block2"},
                {"algorithm": "depth_pruning", "cut": "block1"},
            ],
            "'depth_pruning' after 'depth_pruning'",
        ),
    ],
)
def test_bad_sections_are_refused_before_anything_runs(sections: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sections(sections, TECHNIQUES)
