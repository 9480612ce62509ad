"""Files of depth-pruned networks: the same bits again, and nothing else is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sigmab_plugin.errors import FormatError, ModelError
from sigmab_plugin.hosts.nncf_folder import write as write_folder
from sigmab_plugin.hosts.torch_pruning_section import technique as torch_pruning
from sigmab_plugin.models.ds_cnn import DSCNN
from sigmab_plugin.models.resnet import cifar_resnet18
from sigmab_plugin.techniques.base import Context
from sigmab_plugin.techniques.depth_pruning import depth_prune, load_depth_pruned, save_depth_pruned

CLIPS = torch.randn(2, 1, 16, 6, generator=torch.Generator().manual_seed(0))


def dense(**changes: Any) -> DSCNN:
    options: dict[str, Any] = {"width": 12, "blocks": 3, "input_size": (16, 6), **changes}
    return DSCNN(3, **options).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved network."""
    torch.manual_seed(0)
    save_depth_pruned(depth_prune(dense(), CLIPS, cut="block1", head_widths=(6,)), tmp_path / "net")
    return tmp_path / "net"


def test_save_and_load_are_bitwise(tmp_path: Path) -> None:
    model, inputs = cifar_resnet18().eval(), torch.randn(2, 3, 32, 32)
    net = depth_prune(model, inputs, cut="layer2", head_widths=(24, 8))
    save_depth_pruned(net, tmp_path / "net.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    again = load_depth_pruned(tmp_path / "net.safetensors", cifar_resnet18(), inputs)
    with torch.no_grad():
        assert torch.equal(net(inputs), again(inputs))


def test_a_file_of_another_network_is_refused(path: Path) -> None:
    for other in (dense(width=16), nn.Sequential(dense())):
        with pytest.raises(FormatError, match="does not fit"):
            load_depth_pruned(path, other, CLIPS)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(FormatError, match="not a readable"):
        load_depth_pruned(path, dense(), CLIPS)
    save_file({"a": torch.zeros(1)}, str(path), {"format": "sigmab_plugin.depth_pruning", "version": "9"})
    with pytest.raises(FormatError, match="version '9'"):
        load_depth_pruned(path, dense(), CLIPS)


def test_one_flipped_bit_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    damaged = path.with_name("damaged")
    model = dense()
    for position in range(0, len(content), len(content) // 60):
        flipped = bytearray(content)
        flipped[position] ^= 4
        damaged.write_bytes(flipped)
        with pytest.raises(FormatError):
            load_depth_pruned(damaged, model, CLIPS)


def test_a_network_whose_channels_were_pruned_after_the_cut_is_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    section = torch_pruning.config.from_dict({"algorithm": "torch_pruning", "pruning_ratio": 0.5})
    context = Context(example_inputs=CLIPS)
    net = torch_pruning.apply(depth_prune(dense(), CLIPS, cut="block2"), section, context)
    with pytest.raises(ModelError, match="Prune channels of the dense network before the cut"):
        save_depth_pruned(net, tmp_path / "net")
    assert not list(tmp_path.iterdir())
    # A command that has run all sections by then keeps the weights.
    (written,) = write_folder(net, tmp_path / "run", plain=True)
    assert "What is written are the weights alone" in caplog.text
    assert "else load them into what the same sections make of it" in written.read_by
    assert set(load_file(written.path)) == set(net.state_dict())
    narrow = torch_pruning.apply(dense(), section, context)
    net = depth_prune(narrow, CLIPS, cut="block2")
    save_depth_pruned(net, tmp_path / "net")
    assert torch.equal(load_depth_pruned(tmp_path / "net", narrow, CLIPS)(CLIPS), net(CLIPS))
