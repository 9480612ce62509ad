"""Every file of examples/nncf runs, on the path of the installed NNCF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sigmab_plugin import SigmaBNet

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "nncf").glob("*.json"))


def network_and_batches(path: Path) -> tuple[nn.Module, list[Any]]:
    """A narrow network with the module names of the file's, and two labelled batches of its input."""
    torch.manual_seed(0)
    targets = torch.arange(16) % 4
    if path.name.startswith("pointnet2"):
        pytest.importorskip("torch_geometric")
        from sigmab_plugin.models import PointNet2

        points = torch.rand(4, 1024, 3)[targets] * 2 - 1 + 0.02 * torch.randn(16, 1024, 3)
        return PointNet2(4).eval(), list(zip(points.split(8), targets.split(8), strict=True))
    from sigmab_plugin.models import cifar_resnet50

    images = torch.randn(4, 3, 32, 32)[targets] + 0.3 * torch.randn(16, 3, 32, 32)
    return cifar_resnet50(4, width=1 / 16).eval(), list(zip(images.split(8), targets.split(8), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path: Path, nncf_major: int, request: Any, tmp_path: Path) -> None:
    from sigmab_plugin.hosts.nncf_file import compress_from_file

    request.getfixturevalue("nncf_v2" if nncf_major == 2 else "nncf_functions")
    config = json.loads(path.read_text())
    listed = config["compression"]
    names = [section["algorithm"] for section in (listed if isinstance(listed, list) else [listed])]
    if nncf_major == 2 and "weight_compression" in names:
        pytest.skip("NNCF 2.x config files have no weight_compression")
    model, batches = network_and_batches(path)
    result = compress_from_file(path, model, calibration_data=batches)
    assert isinstance(result.network, SigmaBNet)
    assert f"NNCF {nncf_major}." in result.path
    assert len(result.reports) >= len(names)
    with torch.no_grad():
        output = result.network(batches[0][0])
    assert output.shape == (8, 4)
    assert bool(output.isfinite().all())
    result.save(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    structure = tmp_path / ("compression_state.json" if nncf_major == 2 else "nncf.json")
    own = names[-1] in (
        "quantization",
        "magnitude_sparsity",
    )  # NNCF has no config for weight_compression's hooks
    assert structure.exists() == own
    assert (tmp_path / "plan.json").exists() == (nncf_major == 3 or not own)
    assert (tmp_path / "legonet.safetensors").exists() == (names[-1] == "legonet")


def test_examples_are_checked_without_nncf() -> None:
    from sigmab_plugin.config import SigmaBConfig
    from sigmab_plugin.hosts.nncf_schema import check, read

    presets = {"resnet50": SigmaBConfig.preset("resnet50"), "pointnet2": SigmaBConfig.preset("pointnet2")}
    assert EXAMPLES
    for path in EXAMPLES:
        section = next(s for s in check(read(path)) if s.algorithm == "sigmab")
        assert section.config == presets[path.name.split("_")[0]]
