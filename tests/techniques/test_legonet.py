"""LegoNet on whole models: packing, the file, fine-tuning, the technique."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sigmab_plugin.errors import CalibrationError, ConfigError, FormatError, ModelError
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.legonet import (
    LazyPackedModel,
    LegoNetConfig,
    expand_into,
    expand_node,
    finetune_codebook,
    gaussian_floor,
    load_packed,
    measure,
    pack,
    read_packed,
    save_packed,
    technique,
)


class Mixed(nn.Module):
    """Every kind of weight: convolutions, grouped, transposed, embedding, attention, recurrent, tied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, groups=10)
        self.up = nn.ConvTranspose2d(10, 6, 2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.recurrent = nn.GRU(6, 6, batch_first=True)
        self.embedding = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, images: Tensor) -> Tensor:
        maps = self.up(self.depthwise(self.norm(self.conv(images)).relu()))
        tokens = maps.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0] + self.embedding.weight[:1]
        logits: Tensor = self.head(self.recurrent(tokens)[0].mean(1))
        return logits


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def learnable_batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Ten fixed patterns in noise: learnable in a few steps."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 8, 8, generator=generator)
    batches = []
    for _ in range(count):
        targets = torch.randint(10, (64,), generator=generator)
        batches.append((patterns[targets] + 0.3 * torch.randn(64, 1, 8, 8, generator=generator), targets))
    return batches


def train(net: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int) -> nn.Module:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
    return net.eval()


def accuracy(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    net.eval()
    with torch.no_grad():
        hits = [(net(inputs).argmax(1) == targets).float().mean() for inputs, targets in batches]
    return float(torch.stack(hits).mean())


def same_state(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("scale", ["none", "layer", "row"])
@pytest.mark.parametrize(("block", "size"), [(4, 32), (3, 5), (1, 16), (4, 1)])
def test_file_expands_to_the_same_bits_as_memory(tmp_path: Path, scale: str, block: int, size: int) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    before = copy.deepcopy(model)
    packed = pack(model, LegoNetConfig(block_size=block, codebook_size=size, scale=scale))
    expanded = expand_into(packed, model)
    written = save_packed(packed, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", model)
    assert written == (tmp_path / "net.safetensors").stat().st_size
    assert same_state(expanded, loaded)
    assert same_state(model, before)
    assert loaded.head.weight is loaded.embedding.weight
    images = torch.randn(2, 3, 6, 6)
    assert torch.equal(expanded(images), loaded(images))
    again = read_packed(tmp_path / "net.safetensors")
    assert again.config == packed.config
    assert torch.equal(again.codebook, packed.codebook)


def test_every_weight_of_every_layer_type_is_packed_and_nothing_else() -> None:
    model = Mixed()
    packed = pack(model, LegoNetConfig(codebook_size=4))
    expected = {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert set(packed.tensors) == expected
    assert "attention.in_proj_weight" in expected
    assert "recurrent.weight_hh_l0" in expected
    assert packed.aliases == {"head.weight": "embedding.weight"}
    assert "norm.running_mean" in packed.dense
    for name in expected:
        blocks = packed.tensors[name].indices(4, 4)
        assert int(blocks.max()) < 4


def test_expanded_weights_hold_only_codebook_blocks() -> None:
    from sigmab_plugin.techniques.legonet.blocks import to_blocks

    torch.manual_seed(0)
    model = nn.Linear(32, 32)
    expanded = expand_into(pack(model, LegoNetConfig(codebook_size=8)), model)
    assert len(to_blocks(expanded.weight, 4).unique(dim=0)) <= 8
    # packing again finds the same blocks: nothing more to lose
    second = pack(expanded, LegoNetConfig(codebook_size=8, iterations=50, tolerance=0.0))
    assert measure(second, expanded).relative_error < 1e-6


def test_a_codebook_is_no_larger_than_the_blocks_there_are(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(16, 16)
    with caplog.at_level("INFO"):
        packed = pack(model, LegoNetConfig(codebook_size=2048))
    assert packed.codebook.shape == (16, 16)
    assert "16 blocks" in caplog.text
    torch.testing.assert_close(expand_into(packed, model).weight, model.weight)
    assert measure(packed, model).packed_bytes < 2 * measure(packed, model).dense_bytes


def test_row_scale_serves_rows_of_unequal_size() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight *= torch.logspace(-3, 1, 64)[torch.randperm(64)][:, None]
    errors = {}
    for scale in ("none", "row"):
        packed = pack(model, LegoNetConfig(scale=scale, codebook_size=64))
        weight, expanded = model.weight.detach(), expand_into(packed, model).weight.detach()
        errors[scale] = float(((weight - expanded).square().sum(1) / weight.square().sum(1)).mean())
    assert errors["row"] < 0.5 * errors["none"]


def test_all_zero_layer_keeps_its_zeros() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    for scale in ("none", "layer", "row"):
        expanded = expand_into(pack(model, LegoNetConfig(scale=scale, codebook_size=5)), model)
        assert torch.isfinite(expanded[0].weight).all()
        assert float(expanded[0].weight.detach().abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(16, 16).to(dtype)
    save_packed(pack(model, LegoNetConfig(codebook_size=4, scale="row")), tmp_path / "m")
    loaded = load_packed(tmp_path / "m", model)
    assert loaded.weight.dtype == dtype
    assert same_state(loaded, expand_into(read_packed(tmp_path / "m"), model))


def test_ignored_layers_stay_dense_and_unknown_patterns_are_refused() -> None:
    model = small_net()
    packed = pack(model, LegoNetConfig(codebook_size=4, ignored_layers=("0", "8.weight")))
    assert set(packed.tensors) == {"3.weight"}
    assert torch.equal(packed.dense["0.weight"], model[0].weight)
    with pytest.raises(ConfigError, match=r"layer9\.\*"):
        pack(model, LegoNetConfig(ignored_layers=("layer9.*",)))


@pytest.mark.parametrize("names", [("embedding",), ("head",), ("head.weight", "embedding")])
def test_a_tied_weight_is_ignored_by_each_of_its_names(names: tuple[str, ...]) -> None:
    packed = pack(Mixed(), LegoNetConfig(codebook_size=4, ignored_layers=names))
    assert "embedding.weight" in packed.dense
    assert packed.aliases == {"head.weight": "embedding.weight"}
    assert "conv.weight" in packed.tensors


def test_partial_read_touches_only_its_tensors(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": small_net(), "b": small_net()})
    packed = pack(model, LegoNetConfig(codebook_size=16))
    path = tmp_path / "net.safetensors"
    save_packed(packed, path)
    whole = expand_into(packed, model)
    node = copy.deepcopy(model["b"])
    node.load_state_dict(expand_node(path, "b"))
    assert same_state(node, whole["b"])
    with LazyPackedModel(path) as lazy:
        read: list[str] = []
        original = lazy._tensor
        lazy._tensor = lambda key: (read.append(key), original(key))[1]  # type: ignore[method-assign]
        lazy.expand("b")
        assert read
        assert all(key == "codebook" or key.split(":")[1].startswith("b.") for key in read)
        with pytest.raises(FormatError, match="'c'"):
            lazy.expand("c")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_packed(pack(small_net(), LegoNetConfig(codebook_size=8)), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="readable"):
        read_packed(path)
    flipped = bytearray(data)
    flipped[-3] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(FormatError, match="checksum"):
        read_packed(path)
    with pytest.raises(FormatError, match="no packed model"):
        read_packed(tmp_path / "missing")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="not a packed LegoNet"):
        read_packed(path)


def test_newer_version_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigmab_plugin.techniques.legonet.storage.VERSION", 2)
    save_packed(pack(small_net(), LegoNetConfig(codebook_size=8)), tmp_path / "net")
    monkeypatch.undo()
    with pytest.raises(FormatError, match="install a newer"):
        read_packed(tmp_path / "net")


def test_file_is_plain_data(tmp_path: Path) -> None:
    save_packed(pack(small_net(), LegoNetConfig(codebook_size=8)), tmp_path / "net")
    with safe_open(tmp_path / "net", framework="pt") as handle:
        header = json.loads(handle.metadata()["header"])
        assert handle.get_tensor("index:3.weight").dtype == torch.uint8
    assert header["version"] == 1
    assert LegoNetConfig.from_dict(header["config"]).codebook_size == 8


def test_wrong_architecture_is_refused(tmp_path: Path) -> None:
    packed = pack(small_net(), LegoNetConfig(codebook_size=8))
    with pytest.raises(FormatError, match="do not fit"):
        expand_into(packed, nn.Linear(2, 2))


def test_models_without_weights_or_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="no weight"):
        pack(nn.BatchNorm2d(3))
    with pytest.raises(ModelError, match="run the model once"):
        pack(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ModelError, match=r"'weight' is on the meta device"):
        pack(nn.Linear(8, 8, device="meta"))


def test_measure_counts_real_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    packed = pack(model, LegoNetConfig(codebook_size=32))
    report = measure(packed, model)
    save_file(model.state_dict(), tmp_path / "dense")
    assert report.dense_bytes == (tmp_path / "dense").stat().st_size
    assert report.packed_bytes == save_packed(packed, tmp_path / "packed")
    assert report.ratio == report.dense_bytes / report.packed_bytes
    assert report.index_ratio == pytest.approx(512 / 5)  # 5 bits per block of 16 float32
    assert report.bits_per_weight == 5 / 16
    assert report.ratio < report.index_ratio
    assert report.gaussian_floor == gaussian_floor(5 / 16) == pytest.approx(0.648, abs=1e-3)


def test_gaussian_weights_stay_above_the_rate_distortion_floor() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(model.weight)
    for size in (16, 256):
        report = measure(pack(model, LegoNetConfig(codebook_size=size)), model)
        assert report.gaussian_floor < report.relative_error < 1


@pytest.mark.parametrize("assignments", [False, True], ids=["indices fixed", "straight-through"])
@pytest.mark.parametrize("scale", ["none", "row"])
def test_codebook_finetuning_wins_accuracy_back(tmp_path: Path, assignments: bool, scale: str) -> None:
    batches = learnable_batches()
    model = train(small_net(), batches, 5)
    assert accuracy(model, batches) > 0.95
    packed = pack(model, LegoNetConfig(codebook_size=8, scale=scale))
    before = copy.deepcopy(model)
    tuned = finetune_codebook(packed, model, batches, epochs=15, assignments=assignments)
    assert same_state(model, before)
    first, last = (accuracy(expand_into(p, model), batches) for p in (packed, tuned))
    assert last > first + 0.2
    sizes = [save_packed(p, tmp_path / str(i)) for i, p in enumerate((packed, tuned))]
    assert abs(sizes[0] - sizes[1]) < 64  # checksums are printed in decimal; everything else is equal
    moved = sum(not torch.equal(tuned.tensors[n].index, packed.tensors[n].index) for n in packed.tensors)
    assert (moved > 0) == assignments


def test_batchnorm_reestimation_helps_and_is_stored(tmp_path: Path) -> None:
    batches = learnable_batches()
    model = train(small_net(), batches, 5)
    plain, restored = (
        technique.apply(
            model,
            LegoNetConfig(codebook_size=24, reestimate_batchnorm=reestimate),
            Context(calibration_data=batches),
        )
        for reestimate in (False, True)
    )
    assert accuracy(restored, batches) > accuracy(plain, batches)
    assert torch.equal(restored[3].weight, plain[3].weight)
    assert not torch.equal(restored[4].running_mean, plain[4].running_mean)
    # hosts give inputs without targets
    inputs = [inputs for inputs, _ in batches]
    config = LegoNetConfig(codebook_size=24, reestimate_batchnorm=True)
    assert same_state(technique.apply(model, config, Context(calibration_data=inputs)), restored)
    save_packed(restored.legonet, tmp_path / "net")
    assert same_state(load_packed(tmp_path / "net", model), restored)


def test_without_batchnorm_there_is_nothing_to_reestimate(caplog: pytest.LogCaptureFixture) -> None:
    config = LegoNetConfig(codebook_size=4, reestimate_batchnorm=True)
    with caplog.at_level("INFO"):
        technique.apply(nn.Linear(16, 16), config, Context(calibration_data=[torch.zeros(4, 16)]))
    assert "finds no BatchNorm in Linear" in caplog.text


def test_codebook_gradient_is_the_scattered_weight_gradient() -> None:
    from torch.nn.utils import parametrize

    from sigmab_plugin.techniques.legonet.blocks import to_blocks
    from sigmab_plugin.techniques.legonet.finetune import CodebookWeight

    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    packed = pack(model, LegoNetConfig(codebook_size=3))
    codebook = nn.Parameter(packed.codebook.clone())
    made = CodebookWeight(codebook, packed.tensors["weight"], 4, straight_through=True)
    parametrize.register_parametrization(model, "weight", made, unsafe=True)
    inputs, outward = torch.randn(5, 8), torch.randn(5, 8)
    (model(inputs) * outward).sum().backward()
    weight_gradient = outward.T @ inputs
    scattered = torch.zeros_like(codebook).index_add_(0, made.index, to_blocks(weight_gradient, 4))
    assert torch.allclose(codebook.grad, scattered, atol=1e-5)
    assert torch.allclose(model.parametrizations.weight.original.grad, weight_gradient, atol=1e-5)


def test_finetuning_tied_weights_and_only_the_codebook() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 16)
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.norm = nn.LayerNorm(16)

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(self.embedding(tokens)))
            return logits

    model = Tied()
    tokens = torch.arange(10)
    packed = pack(model, LegoNetConfig(codebook_size=12))
    for assignments in (False, True):
        tuned = finetune_codebook(
            packed, model, [(tokens, tokens)], epochs=20, lr=1e-2, dense=False, assignments=assignments
        )
        expanded = expand_into(tuned, model)
        assert expanded.head.weight is expanded.embedding.weight
        assert torch.equal(expanded.norm.weight, model.norm.weight)
        loss = nn.functional.cross_entropy
        assert loss(expanded(tokens), tokens) < loss(expand_into(packed, model)(tokens), tokens)


def test_finetuning_refuses_what_it_cannot_do() -> None:
    model = Mixed()
    packed = pack(model, LegoNetConfig(codebook_size=4))
    with pytest.raises(ModelError, match="recurrent"):
        finetune_codebook(packed, model, [], epochs=1)
    net = small_net()
    packed = pack(net, LegoNetConfig(codebook_size=4))
    with pytest.raises(CalibrationError, match="no batch"):
        finetune_codebook(packed, net, iter([]), epochs=1)
    with pytest.raises(CalibrationError, match="pairs"):
        finetune_codebook(packed, net, [torch.zeros(1, 1, 8, 8)], epochs=1)


def test_technique_applies_and_carries_the_packed_model() -> None:
    batches = learnable_batches(2)
    model = small_net().eval()
    before = copy.deepcopy(model)
    config = LegoNetConfig.from_dict({"algorithm": "legonet", "codebook_size": 8, "finetune_epochs": 1})
    result = technique.apply(model, config, Context(train_data=batches))
    assert technique.name == "legonet"
    assert same_state(model, before)
    assert not same_state(model, result)
    assert not model.training
    assert not result.training
    packed = result.legonet
    assert same_state(expand_into(packed, model), result)
    with pytest.raises(CalibrationError, match="train_data"):
        technique.apply(model, config, Context())
    with pytest.raises(CalibrationError, match="calibration_data"):
        technique.apply(model, LegoNetConfig(codebook_size=8, reestimate_batchnorm=True), Context())


def test_config_round_trip_and_bounds() -> None:
    config = LegoNetConfig(codebook_size=256, scale="row", ignored_layers=("fc",), sample=1000)
    assert LegoNetConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="codebook_size"):
        LegoNetConfig(codebook_size=0)
    with pytest.raises(ConfigError, match="scale"):
        LegoNetConfig(scale="channel")
