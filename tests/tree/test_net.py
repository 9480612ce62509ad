"""What users do with a network besides calling it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sigmab_plugin import SigmaBNet, SigmaBPruner, load, save, static_twin
from sigmab_plugin.errors import ConfigError
from sigmab_plugin.tree.segments import call

from ..zoo import CASES, Case

RESNET: Case = next(case for case in CASES if case.name == "resnet18")
MLP: Case = next(case for case in CASES if case.name == "mlp")


def _build(case: Case = RESNET, **options: Any) -> SigmaBNet:
    batches = case.batches()
    config = case.config.replace(**options)
    return SigmaBPruner(case.model(), batches[0], config=config, calibration_data=batches).step()


@pytest.fixture(scope="module")
def net() -> SigmaBNet:
    return _build().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return RESNET.batches(1)[0]


def test_routing_modes(net: SigmaBNet, x: torch.Tensor) -> None:
    with torch.no_grad():
        net.routing = "soft"
        soft = net(x)
        net.routing = "hard"
        hard = net(x)
        net.routing = "auto"
        assert torch.equal(net(x), hard)
        net.train()
        torch.manual_seed(0)
        trained = copy.deepcopy(net)
        assert trained._soft()
        net.eval()
        logits, log_p = net.forward_leaves(x)
        assert torch.allclose(soft, (logits * log_p.exp()[:, :, None]).sum(1), atol=1e-6)
    with pytest.raises(ConfigError, match="routing must be one of"):
        net.routing = "warm"


def test_a_path_without_samples_runs_nothing(net: SigmaBNet, x: torch.Tensor) -> None:
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o, key=key: ran.append(key))
        for key, module in net.specializers.items()
    ]
    with torch.no_grad():
        leaf = net.leaves[int(net.route(x[:1]))]
        assert ran == [leaf.split("/")[0]], "route needs no last specializer"
        ran.clear()
        net(x[:1])
    assert ran == [leaf.split("/")[0], leaf.replace("/", "_")]
    for hook in hooks:
        hook.remove()


def test_soft_mode_computes_each_segment_once(net: SigmaBNet, x: torch.Tensor) -> None:
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: ran.append(name))
        for name, module in net.named_modules()
        if name == "backbone" or name.count(".") == 1
    ]
    with torch.no_grad():
        net.forward_leaves(x)
    for hook in hooks:
        hook.remove()
    tree = [name for name in ran if name.split(".")[0] in ("specializers", "heads", "routers")]
    assert len(tree) == len(set(tree)) == 6 + 4 + 3


def test_bf16_autocast(net: SigmaBNet, x: torch.Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for routing in ("soft", "hard"):
            net.routing = routing
            out = net(x)
            assert torch.isfinite(out).all()
        assert net.leaf_probabilities(x).dtype == torch.float32
    net.routing = "auto"
    trained = copy.deepcopy(net).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = trained.loss(x, torch.arange(len(x)) % 5)
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_a_network_of_another_dtype_keeps_it(dtype: torch.dtype, repair: str, tmp_path: Path) -> None:
    batches = [batch.to(dtype) for batch in RESNET.batches()]
    config = RESNET.config.replace(repair=repair)
    model = RESNET.model().to(dtype)
    net = SigmaBPruner(model, batches[0], config=config, calibration_data=batches).step().eval()
    assert {parameter.dtype for parameter in net.parameters()} == {dtype}
    save(net, tmp_path)
    again = load(tmp_path, RESNET.model().to(dtype))
    assert torch.equal(again(batches[0]), net(batches[0]))
    net.train()(batches[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in net.routers.parameters())


def test_channels_last(net: SigmaBNet, x: torch.Tensor) -> None:
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.allclose(other(x.to(memory_format=torch.channels_last)), net(x), atol=1e-4)


def test_deepcopy_and_state_dict(net: SigmaBNet, x: torch.Tensor) -> None:
    twin = copy.deepcopy(net)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(twin(x), expected)
        for parameter in twin.parameters():
            parameter.add_(1.0)
        assert torch.equal(net(x), expected)
        twin.load_state_dict(net.state_dict())
        assert torch.equal(twin(x), expected)
    assert twin.plan == net.plan


def test_same_seed_same_net() -> None:
    first, second, other = _build(), _build(), _build(seed=1)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert first.plan == second.plan
    weights = [n.routers["root"].projection.linear.weight for n in (first, other)]
    assert not torch.equal(*weights)


def test_random_state_of_the_caller_is_not_consumed() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    case = RESNET
    model, batches = case.model(), case.batches()
    torch.manual_seed(7)
    SigmaBPruner(model, batches[0], config=case.config, calibration_data=batches).step()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["soft", "hard"])
def test_export_at_batch_one(routing: str) -> None:
    net = _build(MLP).eval()
    x = MLP.batches(1)[0]
    net.routing = routing
    program = torch.export.export(net, (x[:1],)).module()
    with torch.no_grad():
        for i in range(len(x)):
            assert torch.allclose(program(x[i : i + 1]), net(x[i : i + 1]), atol=1e-5)


def test_compile_per_segment(net: SigmaBNet, x: torch.Tensor) -> None:
    # The graph capture is what can fail; generating machine code takes minutes and is PyTorch's own.
    compiled = copy.deepcopy(net)
    for name, module in compiled.specializers.items():
        compiled.specializers[name] = torch.compile(module, backend="eager", fullgraph=True)  # type: ignore[assignment]
    compiled.backbone = torch.compile(compiled.backbone, backend="eager", fullgraph=True)  # type: ignore[assignment]
    with torch.no_grad():
        assert torch.allclose(compiled(x), net(x), atol=1e-5)


def test_interactive_step_shows_and_takes_edits() -> None:
    case = RESNET
    batches = case.batches()
    pruner = SigmaBPruner(case.model(), batches[0], config=case.config, calibration_data=batches)
    with pytest.raises(ConfigError, match="no step has been completed"):
        _ = pruner.net
    paths = []
    for allocation in pruner.step(interactive=True):
        paths.append((allocation.path, allocation.level))
        if allocation.path == "0":
            name = next(iter(allocation.shared))
            allocation.keep[name] = torch.arange(len(allocation.keep[name]))
    assert [p for p, _ in paths] == ["0", "1", "0/0", "0/1", "1/0", "1/1", "0/0", "0/1", "1/0", "1/1"]
    assert pruner.net.plan.branches["0"].keep[name] == tuple(
        range(len(pruner.net.plan.branches["0"].keep[name]))
    )


@pytest.mark.parametrize(
    "index", [torch.tensor([3, 1]), torch.tensor([0, 99]), torch.tensor([], dtype=torch.long)]
)
def test_interactive_edits_are_checked(index: torch.Tensor) -> None:
    case = RESNET
    batches = case.batches()
    pruner = SigmaBPruner(case.model(), batches[0], config=case.config, calibration_data=batches)

    def edit() -> Iterator[None]:
        for allocation in pruner.step(interactive=True):
            allocation.keep[next(iter(allocation.keep))] = index
            yield

    with pytest.raises(ConfigError, match="branch 0, channels of"):
        list(edit())


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_active_ratio(ratio: float) -> None:
    case = RESNET
    model = case.model()
    net = _build(active_ratio=ratio)
    dense = sum(p.numel() for p in model.parameters())
    assert ratio - 0.05 <= net.parameter_counts().active / dense <= ratio


def test_round_to() -> None:
    net = _build(round_to=8)
    widths = {len(kept) for branch in net.plan.branches.values() for kept in branch.keep.values()}
    assert all(width % 8 == 0 for width in widths)


def test_random_partition_has_the_same_shape(net: SigmaBNet) -> None:
    other = _build(partition="random")
    assert other.parameter_counts() == net.parameter_counts()
    assert other.plan.branches["0"] != net.plan.branches["0"]


def test_balanced_clusters() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    net = _build(case, balanced_clusters=True)
    assert net.plan.splits[""].samples == (18, 18)
    assert all(abs(left - right) <= 1 for left, right in (s.samples for s in net.plan.splits.values()))
    batches = case.batches()
    leaves = torch.bincount(torch.cat([net.route(batch) for batch in batches]), minlength=4)
    assert leaves.tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize("name", ["resnet50", "vit", "pointnet2", "mobilenet_v2"])
def test_inner_planes_per_cluster(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    by_norm = _build(case)
    by_activation = _build(case, inner_selection="activation")
    assert by_activation.parameter_counts() == by_norm.parameter_counts()
    # The first level's outputs are chosen as before; its inner planes now differ between branches.
    left, right = (by_activation.plan.branches[path].keep for path in ("0", "1"))
    outputs = {g.name for g in by_norm.plan.groups if g.is_output()}
    inner = [name for name in left if name not in outputs]
    assert inner
    assert any(left[group] != right[group] for group in inner)
    same, other = (by_norm.plan.branches[path].keep for path in ("0", "1"))
    assert all(same[group] == other[group] for group in inner)
    assert all(left[group] == same[group] for group in left if group in outputs)
    assert not any(m._forward_pre_hooks for m in by_activation.modules())


@pytest.mark.parametrize("name", ["resnet50", "vit", "pointnet2", "mobilenet_v2"])
def test_the_twin_chooses_inner_planes_as_the_tree_does(name: str) -> None:
    """By mean activation over all data, so that a tree that does so has a control that does, too."""
    case = next(case for case in CASES if case.name == name)
    model, batches = case.model(), case.batches()
    by_norm, by_activation = (
        static_twin(model, batches[0], config=config, calibration_data=batches, **case.options)
        for config in (case.config, case.config.replace(inner_selection="activation"))
    )
    shapes = [{n: t.shape for n, t in twin.state_dict().items()} for twin in (by_norm, by_activation)]
    assert shapes[0] == shapes[1]
    other = by_activation.state_dict()
    assert any(not torch.equal(t, other[n]) for n, t in by_norm.state_dict().items())
    assert not any(m._forward_pre_hooks for m in by_activation.modules())


def test_the_twins_inner_planes_are_the_most_active() -> None:
    model, batches = RESNET.model().eval(), RESNET.batches()
    config = RESNET.config.replace(inner_selection="activation")
    twin = static_twin(model, batches[0], config=config, calibration_data=batches, **RESNET.options)
    level = config.levels[0]
    dense = model.get_submodule(f"{level}.0.conv2")
    seen: list[torch.Tensor] = []
    hook = dense.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean(dim=(2, 3))))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    kept = next(m for n, m in twin.named_modules() if n.endswith(f"{level}.0.conv2"))
    best = torch.cat(seen).mean(0).topk(kept.in_channels).indices.sort().values
    outputs = [
        index
        for index, row in enumerate(dense.weight[:, best])
        for own in kept.weight
        if torch.equal(row, own)
    ]
    assert len(outputs) == kept.out_channels


def test_user_given_segments(tmp_path: Any) -> None:
    from sigmab_plugin import load, save

    case = RESNET
    model, batches = case.model(), case.batches()
    pieces = [
        torch.nn.Sequential(model.stem, model.layer1),
        model.layer2,
        model.layer3,
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), model.fc),
    ]
    net = SigmaBPruner(model, batches[0], segments=pieces, projection_dim=16, calibration_data=batches).step()
    traced = _build()
    assert net.parameter_counts() == traced.parameter_counts()
    save(net, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, pieces)(batches[1]), net.eval()(batches[1]))
    with pytest.raises(ConfigError, match="pass the sequence of segments"):
        load(tmp_path, model)


def test_point_clouds_keep_their_order() -> None:
    case = next(case for case in CASES if case.name == "pointnet2")
    net = _build(case).eval()
    pos, batch = case.batches()[1]
    with torch.no_grad():
        together = call(net, (pos, batch))
        for cloud in range(int(batch[-1]) + 1):
            own = pos[batch == cloud]
            assert torch.allclose(
                net(own, torch.zeros(len(own), dtype=torch.long))[0], together[cloud], atol=1e-4
            )
