"""``sigmab`` through NNCF 2.x's create_compressed_model: builder, controller, composition."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sigmab_plugin import SigmaBNet


@pytest.fixture
def build(nncf_v2: Any, config_of: Any, loader: Any, tmp_path: Path) -> Any:
    from nncf import NNCFConfig

    def make(model: nn.Module, *sections: dict[str, Any], state: Any = None, **top: Any) -> Any:
        config = NNCFConfig.from_dict(config_of(*sections, log_dir=str(tmp_path), **top))
        if state is None:
            config = nncf_v2.register_default_init_args(config, loader)
        return nncf_v2.create_compressed_model(model, config, compression_state=state, dump_graphs=False)

    return make


def train(
    controller: Any, network: Any, images: torch.Tensor, targets: torch.Tensor, epochs: int = 2
) -> list[float]:
    """A training loop as NNCF's documentation shows it; returns the losses."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    losses = []
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for start in range(0, 64, 32):
            controller.scheduler.step()
            loss = F.cross_entropy(network(images[start : start + 32]), targets[start : start + 32])
            loss = loss + controller.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    network.eval()
    return losses


def run_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat(
        [torch.from_numpy(session.run(None, {name: image[None].numpy()})[0]) for image in images]
    )


def test_network_is_the_tree_and_the_model_stays_as_it_was(
    build: Any, dense: nn.Module, sections: Any
) -> None:
    before = copy.deepcopy(dense)
    controller, network = build(dense, sections["sigmab"])
    assert isinstance(network, SigmaBNet)
    assert network.leaves == ("0/0", "0/1", "1/0", "1/1")
    assert [type(m) for m in dense.modules()] == [type(m) for m in before.modules()]
    assert dense.state_dict().keys() == before.state_dict().keys()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert not dense.training
    assert int(controller.compression_stage()) == 2
    table = controller.statistics().to_str()
    counts = network.parameter_counts()
    assert f"{counts.active}" in table
    assert f"{counts.total}" in table
    assert "active (largest path)" in table
    assert controller.statistics().sigmab.active == counts.active


def test_repair_in_a_section(build: Any, dense: nn.Module, sections: Any, data: Any) -> None:
    with torch.no_grad():
        wanted = dense(data[0])
        away = []
        for repair in ("none", "least_squares"):
            _, network = build(dense, {**sections["sigmab"], "repair": repair})
            away.append(float((network.eval()(data[0]) - wanted).square().mean()))
    assert away[1] < 0.2 * away[0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_task_loss_plus_controller_loss_is_equation_8(
    build: Any, dense: nn.Module, data: Any, sections: Any, smoothing: float
) -> None:
    images, targets = data
    controller, network = build(dense, sections["sigmab"])
    for (
        parameter
    ) in network.parameters():  # leaves that disagree: the gap between eq. 5 and the mixture is seen
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    network.train()
    expected = network.loss(images, targets, label_smoothing=smoothing)
    gradients = torch.autograd.grad(expected, [p for p in network.parameters() if p.requires_grad])
    task = nn.CrossEntropyLoss(label_smoothing=smoothing)(network(images), targets)
    total = task + controller.loss()
    assert not torch.isclose(task, expected, rtol=1e-3)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    for own, wanted in zip(
        torch.autograd.grad(total, [p for p in network.parameters() if p.requires_grad]),
        gradients,
        strict=True,
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5)
    assert float(controller.loss()) == 0.0  # nothing was run since


def test_controller_loss_takes_targets_and_asks_for_them(
    build: Any, dense: nn.Module, data: Any, sections: Any
) -> None:
    from sigmab_plugin.errors import TrainingError

    images, targets = data
    controller, network = build(dense, sections["sigmab"])
    network.train()
    network(images)
    with pytest.raises(TrainingError, match="needs the targets"):
        controller.loss()
    output = network(images)
    given = controller.loss(targets)
    F.nll_loss(F.log_softmax(output, dim=1), targets)
    output = network(images)
    F.nll_loss(F.log_softmax(output, dim=1), targets)
    torch.testing.assert_close(controller.loss(), given)


def test_missing_calibration_data(
    build: Any, dense: nn.Module, sections: Any, config_of: Any, nncf_v2: Any
) -> None:
    from nncf import NNCFConfig

    from sigmab_plugin.errors import CalibrationError

    kinds = [type(m) for m in dense.modules()]
    with pytest.raises(CalibrationError, match="register_default_init_args"):
        nncf_v2.create_compressed_model(
            dense, NNCFConfig.from_dict(config_of(sections["sigmab"])), dump_graphs=False
        )
    assert [type(m) for m in dense.modules()] == kinds


COMPOSITIONS = {
    "sigmab": ("sigmab",),
    "sigmab, quantization": ("sigmab", "quantization"),
    "sigmab, magnitude_sparsity": ("sigmab", "sparsity"),
    "filter_pruning, sigmab": ("pruning", "sigmab"),
    "magnitude_sparsity, sigmab, quantization": ("sparsity", "sigmab", "quantization"),
}


@pytest.mark.slow
@pytest.mark.parametrize("names", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_train_export_restore(
    build: Any, dense: nn.Module, data: Any, sections: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    images, targets = data
    weights = copy.deepcopy(dense.state_dict())
    chosen = [sections[name] for name in names]
    controller, network = build(dense, *chosen)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, weights[name]), f"{name} of the user's model changed"
    assert len(network.route(images).unique()) > 1
    table = controller.statistics().to_str()
    assert all(word in table for word in ("SigmaB", "active (largest path)"))
    losses = train(controller, network, images, targets)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = network(images)
    controller.export_model(str(tmp_path / "net.onnx"))
    exported = run_onnx(tmp_path / "net.onnx", images)
    equal = torch.isclose(exported, expected, rtol=1e-3, atol=1e-4).all(dim=1)
    # Another order of float sums can move a value over the edge of a quantization step: rarely, and by one step.
    assert float(equal.float().mean()) >= (0.95 if "quantization" in names else 1.0)
    torch.save(
        {"state": controller.get_compression_state(), "weights": network.state_dict()},
        tmp_path / "checkpoint.pth",
    )
    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    _, restored = build(copy.deepcopy(dense), *chosen, state=checkpoint["state"])
    restored.load_state_dict(checkpoint["weights"])
    restored.eval()
    with torch.no_grad():
        assert torch.equal(restored(images), expected)
        stripped = controller.strip().eval()(images)
    agreement = (stripped.argmax(1) == expected.argmax(1)).float().mean()
    assert agreement >= 0.95


@pytest.mark.slow
def test_every_branch_is_quantized_and_none_of_the_nets_own_functions(
    build: Any, dense: nn.Module, sections: Any
) -> None:
    controller, network = build(dense, sections["sigmab"], sections["quantization"])
    quantization = controller.child_ctrls[1]
    points = [str(identifier) for identifier in quantization.all_quantizations]
    for kind, modules in (("specializers", network.specializers), ("heads", network.heads)):
        for key in modules:
            inside = [p for p in points if f"ModuleDict[{kind}]/" in p and f"[{key}]/" in p]
            assert inside, f"{kind}.{key} has no quantizer"
    context = network.nncf.get_tracing_context()
    for hooks in (context._pre_hooks, context._post_hooks):
        for address in hooks:
            if "nncf_model_input" in str(address):  # called first, in every mode
                continue
            scope = getattr(address, "op_address", address).scope_in_model
            assert "/" in str(scope), f"{address} belongs to the net's own forward"


@pytest.mark.slow
def test_leaves_are_calibrated_with_the_samples_they_will_see(
    build: Any, dense: nn.Module, data: Any, sections: Any
) -> None:
    images, _ = data
    controller, network = build(dense, sections["sigmab"], sections["quantization"])
    index, count = max(
        enumerate(network.route(images).bincount(minlength=4).tolist()), key=lambda pair: -pair[1]
    )
    assert 0 < count < 64, "the smallest leaf sees some samples, not all"
    key = network.leaves[index].replace("/", "_")
    quantization = controller.child_ctrls[1]
    quantization.disable_activation_quantization()
    quantization.disable_weight_quantization()
    inside = {
        str(name): info.quantizer_module_ref
        for name, info in quantization.non_weight_quantizers.items()
        if f"GraphModule[{key}]/" in str(name)
    }
    assert inside
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def record(module: nn.Module, args: Any) -> None:
            seen[name] = max(seen.get(name, 0.0), float(args[0].detach().abs().max()))

        return record

    handles = [quantizer.register_forward_pre_hook(watch(name)) for name, quantizer in inside.items()]
    ranges = []
    for routing in ("hard", "soft"):
        seen.clear()
        network.routing = routing
        with torch.no_grad():
            network(images)
        ranges.append(dict(seen))
    for handle in handles:
        handle.remove()
    own, everyone = ranges
    assert own.keys() == inside.keys()
    for name, quantizer in inside.items():
        assert float(quantizer.scale.max()) <= own[name] * 1.05 + 1e-6, name
    assert any(float(quantizer.scale.max()) < 0.9 * everyone[name] for name, quantizer in inside.items())


@pytest.mark.slow
def test_knowledge_distillation_in_the_same_list(
    build: Any, dense: nn.Module, data: Any, sections: Any
) -> None:
    distillation = {"algorithm": "knowledge_distillation", "type": "softmax", "scale": 0.5, "temperature": 2}
    controller, network = build(dense, sections["sigmab"], sections["quantization"], distillation)
    losses = train(controller, network, *data)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_ignored_scopes_of_the_dense_network_hold_in_every_branch(
    build: Any, dense: nn.Module, sections: Any
) -> None:
    scope = "ResNet/Sequential[layer4]/BasicBlock[0]/NNCFConv2d[conv2]/conv2d_0"
    controller, _ = build(dense, sections["sigmab"], {**sections["sparsity"], "ignored_scopes": [scope]})
    table = controller.statistics().to_str()
    assert "NNCFConv2d[conv1]" in table
    assert "[layer4]/BasicBlock[0]/NNCFConv2d[conv2]" not in table
    assert "[routers]" not in table
