"""Mix-and-Match: roles, scores, ranges, strategies and masks."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.errors import CalibrationError, ConfigError, FormatError, ModelError
from sigmab_plugin.techniques.mix_and_match import (
    STRATEGIES,
    LayerRange,
    MaskKeeper,
    MixAndMatchConfig,
    analyse,
    build_masks,
    find_layers,
    layer_sparsities,
    load_masks,
    mask_sparsity,
    measure_sensitivity,
    parametrize_masks,
    remove_masks,
    save_masks,
)

from .mix_and_match_models import IMAGES, SmallResNet, SmallViT, batches, small_vgg, train

MODELS = {"resnet": SmallResNet, "vgg": small_vgg, "vit": SmallViT}


def roles_of(model: nn.Module, config: MixAndMatchConfig | None = None) -> dict[str, str]:
    return {layer.name: layer.role for layer in find_layers(model, torch.randn(IMAGES), config)}


def test_roles_of_a_resnet() -> None:
    roles = roles_of(SmallResNet())
    assert roles.pop("fc.weight") == "classifier"
    norms = {name for name in roles if "bn" in name}
    assert {roles[name] for name in norms} == {"normalization"}
    assert {roles[name] for name in roles.keys() - norms} == {"feature"}
    assert "layer2.shortcut.weight" in roles


def test_roles_of_a_vgg_take_all_linear_layers_as_classifier() -> None:
    roles = roles_of(small_vgg())
    assert [name for name, role in roles.items() if role == "classifier"] == [
        "2.0.weight",
        "2.3.weight",
        "2.6.weight",
    ]
    assert sum(role == "feature" for role in roles.values()) == 8


def test_roles_of_a_vision_transformer() -> None:
    roles = roles_of(SmallViT())
    assert roles["stem.weight"] == "patch_embedding"
    assert roles["blocks.0.attn.qkv.weight"] == roles["blocks.1.attn.proj.weight"] == "attention"
    assert roles["blocks.1.mlp.0.weight"] == roles["blocks.1.mlp.2.weight"] == "feature"
    assert roles["head.weight"] == "classifier"
    assert not {"class_token", "positions"} & roles.keys()


@pytest.mark.slow
def test_roles_of_swin_tiny() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=100))
    layers = find_layers(model, torch.randn(1, 3, 224, 224))
    counts = Counter(layer.role for layer in layers)
    # 12 blocks of query, key, value, output (and a bias table each), two linear layers; three mergings.
    assert counts["patch_embedding"] == counts["classifier"] == 1
    assert counts["attention"] == 12 * 4
    assert counts["feature"] == 12 * 2 + 3
    assert counts["normalization"] == 12 * 2 + 3 + 2
    assert sum(layer.parameters for layer in layers) == pytest.approx(27.6e6, rel=0.01)


@pytest.mark.slow  # transformers takes seconds to import
def test_roles_and_ranges_of_a_small_swin() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=4,
    )
    model = transformers.SwinForImageClassification(config)
    roles = roles_of(model)
    assert roles["swin.embeddings.patch_embeddings.projection.weight"] == "patch_embedding"
    assert [n for n, role in roles.items() if role == "classifier"] == ["classifier.weight"]
    assert {r for n, r in roles.items() if ".attention." in n} == {"attention"}
    assert {r for n, r in roles.items() if "layernorm" in n} == {"normalization"}
    ranges, _ = analyse(
        model, MixAndMatchConfig(), example_inputs=torch.randn(IMAGES), calibration_data=batches(1)
    )
    assert all(layer.minimum <= layer.maximum for layer in ranges)


def test_multihead_attention_and_a_network_of_linear_layers() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.mix = nn.MultiheadAttention(16, 2, batch_first=True)
            self.last = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.first(x)
            logits: Tensor = self.last(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))
            return logits

    found = {layer.name: layer.role for layer in find_layers(Small(), torch.randn(2, 5, 8))}
    assert found["mix.in_proj_weight"] == found["mix.out_proj.weight"] == "attention"
    assert (found["first.weight"], found["last.weight"]) == ("feature", "classifier")
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    found = {layer.name: layer.role for layer in find_layers(dense, torch.randn(2, 8))}
    assert found == {"0.weight": "feature", "2.weight": "feature", "4.weight": "classifier"}


def test_roles_can_be_overridden_and_layers_left_out() -> None:
    config = MixAndMatchConfig(
        roles={"layer3": "attention", "conv1": "embedding"}, ignored_layers=("layer2.*",)
    )
    roles = roles_of(SmallResNet(), config)
    assert roles["layer3.conv1.weight"] == "attention"
    assert roles["conv1.weight"] == "embedding"
    assert not any(name.startswith("layer2") for name in roles)
    with pytest.raises(ConfigError, match="'layer9'"):
        roles_of(SmallResNet(), MixAndMatchConfig(roles={"layer9": "feature"}))
    with pytest.raises(ConfigError, match="'tail'"):
        MixAndMatchConfig(roles={"layer3": "tail"})


def test_models_without_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="no layer weights"):
        find_layers(
            nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(IMAGES)
        )
    with pytest.raises(ModelError, match="run the model once"):
        find_layers(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), torch.randn(IMAGES))


def test_derivatives_are_those_of_the_loss() -> None:
    """G and H g against a Hessian computed entry by entry."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    data = [(torch.randn(6, 3).double(), torch.randint(2, (6,))) for _ in range(2)]
    layers = find_layers(model, data[0][0])
    found = measure_sensitivity(model, layers, data)
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(values: Tensor) -> Tensor:
        first, last = (part.reshape(s) for part, s in zip(values.split([12, 8]), shapes, strict=True))
        return sum(nn.functional.cross_entropy(torch.tanh(x @ first.T) @ last.T, y) for x, y in data) / len(
            data
        )

    gradient = torch.func.grad(loss)(flat)
    product = torch.func.hessian(loss)(flat) @ gradient
    names = ["0.weight", "2.weight"]
    assert torch.allclose(torch.cat([found.gradients[n].flatten() for n in names]), gradient)
    assert torch.allclose(torch.cat([found.hessian_gradients[n].flatten() for n in names]), product)
    kept = found.importance("grasp", "0.weight")
    assert torch.allclose(kept, model[0].weight.detach() * product[:12].reshape(4, 3))
    assert torch.allclose(found.importance("snip", "0.weight"), found.importance("combined", "0.weight"))


@pytest.mark.parametrize("family", MODELS)
def test_ranges_are_what_global_pruning_does(family: str) -> None:
    model = train(MODELS[family](), batches(), 2)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    config = MixAndMatchConfig()
    ranges, sensitivity = analyse(
        model, config, example_inputs=torch.randn(IMAGES), calibration_data=batches(2)
    )
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    by_name = {layer.name: layer for layer in ranges}
    prunable = [layer for layer in ranges if layer.role != "normalization"]
    total = sum(layer.parameters for layer in prunable)
    for layer in prunable:
        assert len(layer.observed) == 9
    for run in prunable[0].observed:
        criterion, sparsity = run.split("@")
        dropped = sum(layer.observed[run] * layer.parameters for layer in prunable)
        if criterion == "magnitude":  # no ties
            assert dropped / total == pytest.approx(float(sparsity), abs=1e-3)
        assert dropped / total >= float(sparsity) - 1e-3
    for layer in ranges:
        assert 0 <= layer.minimum <= layer.maximum <= 0.99
        if layer.role == "normalization":
            assert (layer.minimum, layer.maximum) == (0, 0)
        elif layer.role == "patch_embedding":
            assert 0.15 <= layer.minimum <= layer.maximum <= 0.30
        elif layer.parameters < 10_000:
            assert layer.maximum <= 0.1
    large = max(prunable, key=lambda layer: layer.parameters)
    assert large.parameters >= 10_000
    assert by_name[large.name].maximum == pytest.approx(min(0.99, max(large.observed.values())))
    assert set(sensitivity.weights) == set(by_name)


def example_ranges() -> tuple[LayerRange, ...]:
    return (
        LayerRange("norm.weight", "norm", "normalization", 10, 0.0, 0.0),
        LayerRange("a.weight", "a", "feature", 300, 0.2, 0.8),
        LayerRange("b.weight", "b", "attention", 3600, 0.5, 0.6),
        LayerRange("c.weight", "c", "classifier", 100, 0.4, 0.9),
    )


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("min", [0, 0.2, 0.5, 0.4]),
        ("max", [0, 0.8, 0.6, 0.9]),
        ("midpoint", [0, 0.5, 0.55, 0.65]),
        ("alpha_0.3", [0, 0.38, 0.53, 0.55]),
        ("alpha_0.5", [0, 0.5, 0.55, 0.65]),
        ("alpha_0.7", [0, 0.62, 0.57, 0.75]),
        ("alpha_0.9", [0, 0.74, 0.59, 0.85]),
        # mean |W| = 4000 / 3, so beta = 0.0225, 0.27, 0.0075
        ("parameter_proportional", [0, 0.2135, 0.527, 0.40375]),
        ("classifier_heavy", [0, 0.2, 0.5, 0.9]),
        ("feature_heavy", [0, 0.8, 0.6, 0.4]),
    ],
)
def test_strategies(strategy: str, expected: list[float]) -> None:
    assert list(layer_sparsities(example_ranges(), strategy).values()) == pytest.approx(expected)


def test_there_are_ten_strategies_and_no_others() -> None:
    assert len(STRATEGIES) == 10
    with pytest.raises(ConfigError, match=r"alpha_0\.4"):
        layer_sparsities(example_ranges(), "alpha_0.4")


@pytest.mark.parametrize("score", ["magnitude", "gradient", "combined"])
def test_masks_drop_exactly_the_lowest(score: str) -> None:
    model = SmallResNet()
    layers = find_layers(model, torch.randn(IMAGES))
    sensitivity = measure_sensitivity(model, layers, batches(1), hessian=False)
    masks = build_masks(sensitivity, {"layer3.conv2.weight": 0.7, "fc.weight": 0.0}, score)
    assert set(masks) == {"layer3.conv2.weight"}
    mask = masks["layer3.conv2.weight"]
    importance = sensitivity.importance(score, "layer3.conv2.weight")
    assert int((~mask).sum()) == int(0.7 * mask.numel())
    assert importance[~mask].max() <= importance[mask].min()
    assert mask_sparsity(masks, 2 * mask.numel()) == pytest.approx(0.35, abs=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw", "adam"],
)
def test_masked_weights_stay_zero_through_momentum_and_weight_decay(make) -> None:  # type: ignore[no-untyped-def]
    data = batches(2)
    model = SmallResNet()
    optimizer = make(list(model.parameters()))
    for inputs, targets in data:  # momentum from before the masks
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    mask = torch.rand_like(model.layer3.conv2.weight) > 0.6
    free = copy.deepcopy(model.layer1.conv1.weight.detach())
    kept = model.layer3.conv2.weight.detach().clone()

    def steps() -> None:
        for inputs, targets in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    with MaskKeeper(model, {"layer3.conv2.weight": mask}, optimizer):
        assert model.layer3.conv2.weight[~mask].count_nonzero() == 0
        for _ in range(3):
            steps()
            assert model.layer3.conv2.weight[~mask].count_nonzero() == 0
    assert not torch.equal(model.layer3.conv2.weight[mask], kept[mask])
    assert not torch.equal(model.layer1.conv1.weight, free)
    # the keeper is what holds them: without it the same step revives them
    steps()
    assert model.layer3.conv2.weight[~mask].count_nonzero() > 0


def test_parametrized_masks_hold_in_foreign_loops_and_can_be_made_permanent() -> None:
    model = SmallViT()
    names = ("blocks.0.attn.qkv.weight", "head.weight")
    masks = {name: torch.rand(model.get_parameter(name).shape) > 0.5 for name in names}
    keys = set(model.state_dict())
    parametrize_masks(model, masks)
    train(model, batches(2), 1)
    assert model.head.weight[~masks["head.weight"]].count_nonzero() == 0
    inputs = torch.randn(IMAGES)
    before = model(inputs)
    remove_masks(model)
    assert set(model.state_dict()) == keys
    assert torch.allclose(model(inputs), before)
    assert model.blocks[0].attn.qkv.weight[~masks["blocks.0.attn.qkv.weight"]].count_nonzero() == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_tied_weight_is_masked_wherever_it_is_used(name: str) -> None:
    model = Tied()
    mask = torch.rand(6, 6) > 0.5
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.first.weight *= mask
    parametrize_masks(model, {name: mask})
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), expected(x))
    remove_masks(model)
    assert model.first.weight is model.second.weight
    torch.testing.assert_close(model(x), expected(x))


def test_masks_of_another_model_and_recurrent_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="another model"):
        parametrize_masks(SmallResNet(), {"nowhere.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ModelError, match="another model"):
        MaskKeeper(SmallResNet(), {"layer3.conv2.weight": torch.ones(2, 2, dtype=torch.bool)})
    gru = nn.Sequential(nn.GRU(4, 4))
    with pytest.raises(ModelError, match="recurrent"):
        parametrize_masks(gru, {"0.weight_ih_l0": torch.ones(12, 4, dtype=torch.bool)})


def test_masks_round_trip(tmp_path: Path) -> None:
    masks = {"a": torch.rand(5, 3) > 0.5, "b": torch.rand(7) > 0.5}
    save_masks(masks, tmp_path / "masks")
    loaded = load_masks(tmp_path / "masks")
    assert all(torch.equal(masks[name], loaded[name]) for name in masks)
    (tmp_path / "masks").write_bytes(b"no")
    with pytest.raises(FormatError):
        load_masks(tmp_path / "masks")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(iter([]), "no batch", id="empty"),
        pytest.param([torch.randn(IMAGES)], "pairs", id="no targets"),
        pytest.param(
            [(torch.full(IMAGES, float("nan")), torch.zeros(4, dtype=torch.long))], "finite", id="nan"
        ),
    ],
)
def test_unusable_calibration_data_is_refused(data: object, words: str) -> None:
    model = SmallResNet()
    with pytest.raises(CalibrationError, match=words):
        analyse(model, MixAndMatchConfig(), example_inputs=torch.randn(IMAGES), calibration_data=data)  # type: ignore[arg-type]


def test_config_round_trip_and_bad_values() -> None:
    config = MixAndMatchConfig(sparsities=(0.5,), roles={"a": "feature"}, role_limits={"feature": (0.1, 0.2)})
    assert MixAndMatchConfig.from_dict(config.to_dict()) == config
    for bad in (
        {"sparsities": (1.0,)},
        {"scores": ("size",)},
        {"strategies": ()},
        {"role_limits": {"feature": (1, 0)}},
    ):
        with pytest.raises(ConfigError):
            MixAndMatchConfig(**bad)
