"""What must hold for every network, whatever its family."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBPruner, load, save, static_twin
from sigmab_plugin.channels import slices_of
from sigmab_plugin.channels.slicing import named_tensors
from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.errors import ModelError
from sigmab_plugin.tree.clustering import spherical_kmeans
from sigmab_plugin.tree.plan import Plan, module_key, prefixes
from sigmab_plugin.tree.segments import call, cut

from ..zoo import CASES, Case


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def built(request: pytest.FixtureRequest) -> Any:
    case: Case = request.param
    model = case.model()
    before = copy.deepcopy(model)
    batches = case.batches()
    pruner = SigmaBPruner(model, batches[0], config=case.config, calibration_data=batches, **case.options)
    net = pruner.step()
    return case, model, before, batches, pruner, net


def _dense(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return call(model, inputs)


def test_model_is_left_as_it_was(built: Any) -> None:
    _, model, before, _, _, _ = built
    for (name, tensor), (_, old) in zip(
        named_tensors(model).items(), named_tensors(before).items(), strict=True
    ):
        assert torch.equal(tensor, old), name
        assert tensor.requires_grad == old.requires_grad
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not any(m._forward_hooks for m in model.modules())


def test_branches_are_narrower(built: Any) -> None:
    case, model, _, _, _, net = built
    counts = net.parameter_counts()
    assert counts.active < counts.total
    assert sum(len(b.keep) for b in net.plan.branches.values()) > 0
    if case.name not in ("vit", "unequal-branches", "resnet18-mid-stage", "mlp-one-level"):
        assert counts.active - counts.routers < parameter_count(model)


def test_weights_are_dense_slices(built: Any) -> None:
    case, model, _, _, _, net = built
    segments = cut(model, levels=case.config.levels, head=case.config.head)
    for path in net.plan.branches:
        depth = len(prefixes(path))
        pieces = [(depth - 1, net.specializers[module_key(path)])]
        if path in net.leaves:
            pieces.append((depth, net.heads[module_key(path)]))
        for number, piece in pieces:
            dense = named_tensors(segments.tail[number])
            slices = slices_of(
                net.plan.groups, net.plan.kept(path), segment=number, shapes=net.plan.tensors[number + 1]
            )
            for name, tensor in named_tensors(piece).items():
                expected = dense[name]
                for dim, index in slices.get(name, {}).items():
                    expected = expected.index_select(dim, index)
                assert torch.equal(tensor, expected), (path, name)
                assert tensor.data_ptr() != dense[name].data_ptr()


def test_every_channel_kept_is_the_dense_model(built: Any) -> None:
    case, model, _, batches, pruner, _ = built
    widths: dict[str, dict[str, int]] = {}
    for group in pruner.prepared.groups:
        if group.prunable and group.owner >= 0:
            widths.setdefault(pruner.prepared.segments.names[group.owner], {})[group.name] = group.size
    config = case.config.replace(widths=widths)
    net = SigmaBPruner(model, batches[0], config=config, calibration_data=batches, **case.options).step()
    expected = _dense(model, batches[1])
    with torch.no_grad():
        logits, _ = call(net.forward_leaves, batches[1])
    for leaf in range(len(net.leaves)):
        assert torch.equal(logits[:, leaf], expected)


def test_hard_routing_is_one_hot_soft_routing(built: Any) -> None:
    _, _, _, batches, _, net = built
    net.routing = "hard"
    with torch.no_grad():
        hard = call(net, batches[0])
        leaves = call(net.route, batches[0])
        logits, log_p = call(net.forward_leaves, batches[0])
    assert torch.allclose(hard, logits[torch.arange(len(leaves)), leaves], atol=1e-5)
    assert torch.allclose(log_p.exp().sum(dim=1), torch.ones(len(leaves)), atol=1e-5)
    for router in net.routers.values():
        router.temperature = 1e-6
    net.routing = "soft"
    with torch.no_grad():
        soft = call(net, batches[0])
    for router in net.routers.values():
        router.temperature = 1.0
    net.routing = "auto"
    assert torch.allclose(hard, soft, atol=1e-5)


def test_batch_equals_sample_by_sample(built: Any) -> None:
    _, _, _, batches, _, net = built
    net.routing = "hard"
    frontier = call(net.backbone, batches[1])
    size = net.modality.size(frontier)
    with torch.no_grad():
        together = net._one_path(frontier)
        alone = torch.cat(
            [net._one_path(net.modality.take(frontier, torch.tensor([i]))) for i in range(size)]
        )
    net.routing = "auto"
    assert torch.allclose(together, alone, atol=1e-5)


def test_calibration_partition_is_reproduced(built: Any) -> None:
    _, _, _, batches, _, net = built
    with torch.no_grad():
        leaves = torch.cat([call(net.route, batch) for batch in batches])
        pooled = torch.cat([net.modality.pool(call(net.backbone, batch)) for batch in batches])
        latents = net.routers["root"].projection(pooled)
    chosen = [net.leaves[i] for i in leaves.tolist()]
    for path, split in net.plan.splits.items():
        for branch in (0, 1):
            below = f"{path}/{branch}" if path else str(branch)
            assert (
                sum(leaf == below or leaf.startswith(below + "/") for leaf in chosen) == split.samples[branch]
            )
    # Clustering afresh from the net's own centroids' seed gives the same two sides.
    first = torch.tensor([int(leaf.split("/")[0]) for leaf in chosen])
    centroids = net.routers["root"].linear.weight
    assert torch.equal((latents @ centroids.T).argmax(dim=1), first)
    again = spherical_kmeans(latents, seed=1)
    own = nn.functional.cosine_similarity(latents, centroids[first]).mean()
    assert float(own) >= again.objective - 1e-3
    assert torch.allclose(centroids.norm(dim=1), torch.ones(2), atol=1e-5)
    assert float(net.routers["root"].linear.bias.abs().max()) == 0


def test_counted_parameters_are_those_touched(built: Any) -> None:
    _, _, _, batches, _, net = built
    touched: dict[int, int] = {}
    hooks = []
    for module in net.modules():
        if not list(module.children()):
            hooks.append(
                module.register_forward_hook(
                    lambda m, i, o: touched.update({id(p): p.numel() for p in m.parameters()})
                )
            )
    net.routing = "hard"
    frontier = call(net.backbone, batches[0])
    with torch.no_grad():
        leaf = net.leaves[int(call(net.route, batches[0])[0])]
        touched.clear()
        net.backbone(*(batches[0] if isinstance(batches[0], tuple) else (batches[0],)))
        net._one_path(net.modality.take(frontier, torch.tensor([0])))
    net.routing = "auto"
    for hook in hooks:
        hook.remove()
    # Parameters outside of leaf modules (position embeddings, layer scales, packed attention).
    names = [
        f"{name}.{own}" if name else own
        for name, module in net.named_modules()
        if list(module.children())
        for own, _ in module.named_parameters(recurse=False)
    ]
    on_path = [module for _, module in net.path_modules(leaf)]
    alive = {id(p) for module in on_path for p in module.parameters()}
    for name in names:
        parameter = net.get_parameter(name)
        if id(parameter) in alive:
            touched[id(parameter)] = parameter.numel()
    # The attention's output projection is read by its parent, not called.
    for module in on_path:
        for inner in module.modules():
            if isinstance(inner, nn.MultiheadAttention):
                touched.update({id(p): p.numel() for p in inner.out_proj.parameters()})
    assert sum(touched.values()) == net.parameter_counts().per_path[leaf]


def test_save_and_load_are_bitwise(built: Any, tmp_path: Any) -> None:
    case, _, _, batches, _, net = built
    save(net, tmp_path)
    again = load(tmp_path, case.make())
    assert list(again.state_dict()) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.plan == net.plan
    net.eval()
    with torch.no_grad():
        assert torch.equal(call(again, batches[0]), call(net, batches[0]))


def test_a_net_whose_widths_have_changed_is_not_saved(built: Any, tmp_path: Any) -> None:
    net = copy.deepcopy(built[-1])
    name, layer = next(
        (n, m) for n, m in net.specializers.named_modules() if getattr(m, "weight", None) is not None
    )
    layer.weight = torch.nn.Parameter(layer.weight.detach()[:-1])
    with pytest.raises(ModelError, match=rf"specializers\.{re.escape(name)}\.weight has shape"):
        save(net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_plan_round_trips(built: Any) -> None:
    plan = built[-1].plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_trains_in_soft_routing(built: Any) -> None:
    _, _, _, batches, _, net = built
    trained = copy.deepcopy(net).train()
    size = net.modality.size(call(net.backbone, batches[0]))
    loss = trained.loss(batches[0], torch.arange(size) % 5)
    loss.backward()
    missing = [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert torch.isfinite(loss)


def test_static_twin_has_one_path_of_that_shape(built: Any) -> None:
    case, model, _, batches, _, net = built
    twin = static_twin(model, batches[0], config=case.config, calibration_data=batches, **case.options)
    counts = net.parameter_counts()
    largest = max(net.leaves, key=lambda leaf: counts.per_path[leaf])
    routers = parameter_count(*(m for name, m in net.path_modules(largest) if name.startswith("routers")))
    assert parameter_count(twin) == counts.active - routers
    assert call(twin, batches[0]).shape == _dense(model, batches[0]).shape


def test_macs_add_up(built: Any) -> None:
    _, model, _, batches, _, net = built
    counts = net.macs(batches[0])
    assert counts.backbone < counts.active <= counts.total
    assert counts.backbone < macs(model, batches[0])
    assert set(counts.per_path) == set(net.leaves)
