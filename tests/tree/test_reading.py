"""What crosses a cut, and whether the pieces are the model, is found out before anything is built."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBConfig, SigmaBNet, SigmaBPruner, load, save, static_twin
from sigmab_plugin.errors import ConfigError, ModelError
from sigmab_plugin.tree.prepare import prepare

CONFIG = SigmaBConfig(levels=("b", "c"), head="d", projection_dim=8)


class Net(nn.Module):
    """Parts a, b, c, d in a row; a subclass changes what it wants to."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.a = parts.get("a") or nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.b = parts.get("b") or nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.c = parts.get("c") or nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.ReLU())
        self.d = parts.get("d") or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))

    def forward(self, x: Any) -> Any:
        return self.d(self.c(self.b(self.a(x))))


def _images(count: int = 12) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8)


def _built(net: nn.Module, *batches: Any, **options: Any) -> SigmaBNet:
    return (
        SigmaBPruner(net, batches[0], config=CONFIG, calibration_data=list(batches), **options).step().eval()
    )


def _refused(net: nn.Module, example: Any, message: str, **options: Any) -> None:
    before = copy.deepcopy(net.state_dict()), set(vars(net)), [m.training for m in net.modules()]
    with pytest.raises(ModelError, match=message):
        prepare(net, example, config=CONFIG, **options)
    assert set(vars(net)) == before[1]
    assert [m.training for m in net.modules()] == before[2]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[0][name], rtol=0, atol=0, equal_nan=True)


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.layer(x)
        return self.out(x)


@pytest.mark.parametrize(
    "level", [Adding(), nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(8, 16, 3))], ids=["adds", "activates"]
)
def test_a_level_that_changes_its_input_is_refused(level: nn.Module) -> None:
    _refused(Net(b=level), _images(), "level 'b' changes its input in place.*inplace=False")


def test_a_head_may_work_in_place() -> None:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    net = _built(Net(d=head), _images(), _images())
    x = _images()
    logits, _ = net.forward_leaves(x)
    hard, leaf = net.forward_routed(x)
    torch.testing.assert_close(hard, logits[torch.arange(12), leaf], atol=1e-5, rtol=1e-4)


class Optional(Net):
    def forward(self, x: torch.Tensor, flip: Any = None) -> torch.Tensor:
        return super().forward(-x if flip is None else x)


class Masked(Net):
    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return super().forward(x if mask is None else x * mask)


def test_the_pieces_must_compute_what_the_model_does() -> None:
    _refused(Optional(), _images(), "do not compute what the model computes.*optional arguments")
    _refused(Masked(), _images(), "does not run: .*optional in forward must be given")
    hooked = Net()
    handle = hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3 + 1,))
    _refused(hooked, _images(), "hooks on the model itself")
    handle.remove()
    prepare(hooked, _images(), config=CONFIG)


def test_an_example_that_the_model_cannot_take() -> None:
    _refused(Net(), _images().double(), "does not run on example_inputs")
    _refused(Net(), torch.randn(4, 1, 8, 8), "does not run on example_inputs")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ModelError, match="meta device"):
        prepare(model, _images(), config=CONFIG)


class Tokens(nn.Module):
    """Sequence first, as PyTorch's transformer layers are unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 16)
        self.b, self.c = (nn.TransformerEncoderLayer(16, 2, 32, batch_first=False) for _ in range(2))
        self.d = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x).transpose(0, 1))).mean(0))


class Views(Net):
    """Four views of a sample, folded into the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x.flatten(0, 1))))).view(-1, 4, 5).mean(1)


@pytest.mark.parametrize("samples", [1, 7, 12])
def test_the_batch_must_come_first(samples: int) -> None:
    # Seven tokens: with seven samples the shapes agree by chance.
    _refused(Tokens(), torch.randn(samples, 7, 6), "'b' there are 7 rows .*batch_first=True")
    _refused(Views(), torch.randn(samples, 4, 3, 8, 8), "must have the batch as its first dimension")


class TwoValues(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return [x, x + 1]


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 24, 3)

    def forward(self, pair: Any) -> torch.Tensor:
        return self.layer(pair[0] + pair[1])


def test_a_list_between_two_modules_is_no_frontier() -> None:
    pair = nn.Sequential(nn.Conv2d(8, 16, 3), TwoValues())
    _refused(Net(b=pair, c=Reads()), _images(), "'c' is one list of 2 values")


class Logits(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.layer = form, nn.Conv2d(24, 5, 1)

    def forward(self, x: torch.Tensor) -> Any:
        maps = self.layer(x)
        logits = maps.mean((2, 3))
        return {"dict": {"logits": logits}, "tuple": (logits,), "maps": maps, "flat": logits.sum(1)}[
            self.form
        ]


@pytest.mark.parametrize("form", ["dict", "tuple", "maps", "flat"])
def test_outputs_other_than_logits_are_refused(form: str) -> None:
    _refused(Net(d=Logits(form)), _images(), r"one tensor of logits \(B, classes\), and returns")


def _audio(head: nn.Module, length: int) -> tuple[nn.Module, torch.Tensor]:
    parts = {"a": (1, 8), "b": (8, 16), "c": (16, 24)}
    layers = {k: nn.Sequential(nn.Conv1d(*v, 3, padding=1), nn.ReLU()) for k, v in parts.items()}
    return Net(d=head, **layers), torch.randn(12, 1, length)


@pytest.mark.parametrize("length", [10, 40])
def test_channels_of_audio_are_found_behind_the_last_convolution(length: int) -> None:
    head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 5))
    net, x = _audio(head, length)
    prepared = prepare(net, x, config=CONFIG)
    assert prepared.features == (8, 16, 24)
    assert _built(net, x)(x).shape == (12, 5)


class Block(nn.Module):
    """As in Swin: the channels of a map (B, H, W, C) come last."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(inputs), nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(self.norm(x)))


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mean((1, 2)))


@pytest.mark.parametrize("side", [4, 32])
def test_channels_last_are_found(side: int) -> None:
    net = Net(a=nn.Linear(3, 8), b=Block(8, 16), c=Block(16, 24), d=Mean())
    x = torch.randn(12, side, side, 3)
    prepared = prepare(net, x, config=CONFIG)
    assert [kind.name for kind in prepared.modalities] == ["channels_last"] * 3
    assert prepared.features == (8, 16, 24)
    assert [g.name for g in prepared.groups if g.prunable] == ["b.layer", "c.layer"]


class Merging(nn.Module):
    """As in Swin: a stage begins with four neighbours beside one another."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.merge, self.block = nn.Linear(4 * inputs, outputs), Block(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.block(self.merge(torch.cat(parts, -1)))


def test_channels_last_are_found_before_patches_are_merged() -> None:
    net = Net(a=nn.Linear(3, 8), b=Merging(8, 16), c=Merging(16, 24), d=Mean())
    prepared = prepare(net, torch.randn(12, 16, 16, 3), config=CONFIG)
    assert [kind.name for kind in prepared.modalities] == ["channels_last"] * 3
    assert prepared.features == (8, 16, 24)


class AlongRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.conv = nn.Linear(8, 8), nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x + self.rows(x)))


def test_a_linear_layer_along_rows_makes_no_channels_last() -> None:
    prepared = prepare(Net(b=AlongRows()), _images(), config=CONFIG)
    assert [kind.name for kind in prepared.modalities] == ["images"] * 3


class Noisy(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + torch.randn_like(x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Conv2d(3, 8, 3, padding=1), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_noise_in_eval_is_no_fault_but_a_changing_state_is() -> None:
    prepare(Noisy(), _images(), config=CONFIG)
    _refused(Net(a=Counting()), _images(), "other outputs for the same inputs when it is called again")


def test_infinite_logits_are_compared() -> None:
    net = Net()
    with torch.no_grad():
        net.d[2].bias[1] = -torch.inf
        net.d[2].bias[2] = torch.nan
    prepare(net, _images(), config=CONFIG)


def test_inference_mode() -> None:
    net = Net().eval()
    with torch.inference_mode():
        x = _images() + 1
    prepare(net, x.clone(), config=CONFIG)


def test_inputs_whose_first_dimension_is_not_the_batch() -> None:
    class Mixing(Net):
        def forward(self, x: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.einsum("bchw,cd->bdhw", x, colours))

    prepare(Mixing(), (_images(3), torch.eye(3)), config=CONFIG)


def test_points_as_plain_tensors() -> None:
    class Points(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(inputs, outputs)

        def forward(self, x: torch.Tensor, pos: torch.Tensor, batch: torch.Tensor) -> Any:
            return torch.relu(self.layer(x)), pos, batch

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(24, 5)

        def forward(self, x: torch.Tensor, pos: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            count = int(batch.max()) + 1
            return self.layer(x.new_zeros(count, x.shape[1]).index_add_(0, batch, x))

    class Cloud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = Points(6, 8), Points(8, 16), Points(16, 24), Pooled()

        def forward(self, x: torch.Tensor, pos: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
            x, pos, batch = self.a(x, pos, batch)
            x, pos, batch = self.b(x, pos, batch)
            x, pos, batch = self.c(x, pos, batch)
            return self.d(x, pos, batch)

    inputs = (torch.randn(36, 6), torch.randn(36, 3), torch.arange(36) // 3)
    prepared = prepare(Cloud(), inputs, config=CONFIG)
    assert [kind.name for kind in prepared.modalities] == ["points"] * 3


class Conformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(16), nn.Conv1d(16, 16, 3, padding=1)
        self.layer = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.layer(x)


class Average(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def test_tokens_with_a_convolution_inside_are_tokens() -> None:
    net = Net(a=nn.Linear(6, 16), b=Conformer(), c=Conformer(), d=nn.Sequential(Average(), nn.Linear(16, 5)))
    prepared = prepare(net, torch.randn(12, 9, 6), config=CONFIG)
    assert [kind.name for kind in prepared.modalities] == ["tokens"] * 3


class Constant(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor(2.0))


def test_constants_of_forward_leave_nothing_on_the_model(tmp_path: Any) -> None:
    model, x = Constant(), _images()
    before = set(vars(model))
    net = _built(model, x, x + 1)
    assert set(vars(model)) == before
    save(net, tmp_path)
    for dense in (model, Constant()):
        torch.testing.assert_close(load(tmp_path, dense).eval()(x), net(x), rtol=0, atol=0)
    assert set(vars(model)) == before


def test_forward_fn_is_used_for_calibration_too() -> None:
    batches = [{"image": _images(), "name": torch.zeros(12)} for _ in range(2)]

    def forward_fn(module: nn.Module, batch: Any) -> Any:
        return module(batch["image"])

    model = Net().eval()
    for repair in ("none", "least_squares"):
        config = CONFIG.replace(repair=repair)
        options = {"config": config, "calibration_data": batches, "forward_fn": forward_fn}
        assert SigmaBPruner(model, batches[0], **options).step()(batches[0]["image"]).shape == (12, 5)
        assert static_twin(model, batches[0], **options)(batches[0]["image"]).shape == (12, 5)


def test_categories_beside_vectors_are_no_point_cloud() -> None:
    class Embedded(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(inputs, outputs), nn.Embedding(4, outputs)

        def forward(self, x: torch.Tensor, other: torch.Tensor, kind: torch.Tensor) -> Any:
            return torch.relu(self.layer(x) + self.table(kind)), other, kind

    class Three(Net):
        def forward(self, x: torch.Tensor, other: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
            x, other, kind = self.b(torch.relu(self.a(x)), other, kind)
            x, other, kind = self.c(x, other, kind)
            return self.d(x)

    net = Three(a=nn.Linear(6, 8), b=Embedded(8, 16), c=Embedded(16, 24), d=nn.Linear(24, 5))
    inputs = (torch.randn(12, 6), torch.randn(12, 9), torch.arange(12) % 4)
    config = CONFIG
    pruner = SigmaBPruner(net, inputs, config=config, calibration_data=[inputs])
    assert [kind.name for kind in pruner.prepared.modalities] == ["vectors"] * 3
    assert pruner.step()(*inputs).shape == (12, 5)


def test_segments_must_be_modules() -> None:
    with pytest.raises(ConfigError, match="segments takes modules, not function"):
        SigmaBPruner(None, _images(), segments=[nn.Conv2d(3, 8, 3), lambda x: x, nn.Flatten()])


def test_a_layer_of_another_model_cannot_be_ignored() -> None:
    net = Net()
    layer = copy.deepcopy(net).c[0]
    with pytest.raises(ConfigError, match="Conv2d that is no module of this model"):
        prepare(net, _images(), config=CONFIG, ignored_layers=[layer])
    prepared = prepare(net, _images(), config=CONFIG.replace(levels=("b",), head="c"), ignored_layers=net.a)
    assert prepared.owned(0)
