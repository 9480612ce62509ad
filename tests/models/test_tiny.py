"""The two MLPerf Tiny networks: exact sizes, exact padding, and the published weights where present."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.errors import FormatError, ModelError
from sigmab_plugin.models._tiny import same_padding, separable_block
from sigmab_plugin.models.ds_cnn import DSCNN, load_mlperf_ds_cnn
from sigmab_plugin.models.mobilenet_v1 import MobileNetV1, load_mlperf_mobilenet_v1

DATA = os.environ.get("SIGMAB_DATA")
needs_data = pytest.mark.skipif(
    DATA is None, reason="set SIGMAB_DATA to the folder with the MLPerf Tiny checkpoints"
)


def statistics(model: nn.Module) -> int:
    """Running means and variances, which Keras counts as parameters."""
    return sum(2 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_ds_cnn_has_the_published_size() -> None:
    model = DSCNN()
    assert parameter_count(model) == 23_756
    assert parameter_count(model) + statistics(model) == 24_908
    assert macs(model, torch.zeros(1, 1, 49, 10)) == 2_656_768


def test_mobilenet_v1_has_the_published_size() -> None:
    model = MobileNetV1()
    assert parameter_count(model) + statistics(model) == 221_794
    assert macs(model, torch.zeros(1, 3, 96, 96)) == 7_489_664


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (49, 10, 2, (4, 5)),
        (10, 4, 2, (1, 1)),
        (96, 3, 2, (0, 1)),
        (25, 3, 1, (1, 1)),
        (25, 3, 2, (1, 1)),
        (4, 1, 2, (0, 0)),
    ],
)
def test_same_padding_puts_the_odd_zero_after(
    size: int, kernel: int, stride: int, expected: tuple[int, int]
) -> None:
    assert same_padding(size, kernel, stride) == expected


def test_stride_two_block_reads_the_pixels_that_tensorflow_reads() -> None:
    """Even size, stride 2: the first window starts at pixel 0 and the last one hangs over by one."""
    block = separable_block(1, 1, size=(4, 4), stride=2)
    with torch.no_grad():
        block.dw_conv.weight.fill_(1.0)
        block.dw_conv.bias.zero_()
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    out = block.dw_conv(block.dw_pad(image))
    assert out.flatten().tolist() == [45.0, 39.0, 66.0, 50.0]


def test_intermediate_maps_have_the_reference_shapes() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    model = MobileNetV1().eval()
    for name in ("stem", "block5", "block6", "block13"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 2)
    assert shapes == {
        "stem": (8, 48, 48),
        "block5": (64, 12, 12),
        "block6": (128, 6, 6),
        "block13": (256, 3, 3),
    }


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(b"\x10\x00\x00")
    with pytest.raises(FormatError, match="not a readable safetensors"):
        load_mlperf_ds_cnn(truncated)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"layer9.weight": torch.zeros(2)}, str(foreign))
    with pytest.raises(FormatError, match=r"layer9\.weight"):
        load_mlperf_ds_cnn(foreign)
    partial = tmp_path / "partial.safetensors"
    save_file({"fc.weight": torch.zeros(12, 64)}, str(partial))
    with pytest.raises(FormatError, match=r"stem\.conv"):
        load_mlperf_ds_cnn(partial)
    wide = tmp_path / "wide.safetensors"
    save_file({"conv1.weight": torch.zeros(8, 1, 10, 4)}, str(wide))
    with pytest.raises(FormatError, match=r"\(8, 1, 10, 4\)"):
        load_mlperf_ds_cnn(wide)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ModelError, match="blocks"):
        DSCNN(blocks=0)
    with pytest.raises(ModelError, match="channels"):
        MobileNetV1(width_multiplier=0.01)


@needs_data
@pytest.mark.slow
def test_ds_cnn_reproduces_the_published_accuracy() -> None:
    folder = Path(str(DATA))
    model, metadata = load_mlperf_ds_cnn(folder / "checkpoints" / "kws_dscnn_mlperf.safetensors")
    assert "83" in metadata["normalise"]
    clips = np.load(folder / "kws_sc2_mfcc_int8.npz")

    def correct(part: str) -> int:
        values = (clips[f"{part}_x"].astype(np.float32) - float(clips["zero_point"])) * float(clips["scale"])
        with torch.no_grad():
            predicted = torch.cat(
                [model(chunk) for chunk in torch.from_numpy(values).unsqueeze(1).split(512)]
            )
        return int((predicted.argmax(1).numpy() == clips[f"{part}_y"]).sum())

    assert correct("kws01") == 915
    assert correct("test") == 4507  # 92.17 % of 4890


@needs_data
def test_mobilenet_v1_loads_the_published_weights() -> None:
    path = Path(str(DATA)) / "checkpoints" / "vww_mobilenetv1_025_96_mlperf.safetensors"
    model, metadata = load_mlperf_mobilenet_v1(path)
    assert metadata["normalise"] == "x/255"
    variances = [m.running_var for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(variances) == 27
    assert all(bool((v >= 0).all()) for v in variances)
    with torch.no_grad():
        logits = model(torch.linspace(0, 1, 3 * 96 * 96).reshape(1, 3, 96, 96))
    assert logits.shape == (1, 2)
    assert bool(logits.isfinite().all())
