"""``sigmab export`` on a saved network."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sigmab_plugin import SigmaBConfig, SigmaBPruner, save
from sigmab_plugin.cli import main
from sigmab_plugin.cli.folder import record_of
from sigmab_plugin.deploy import Runner, read_manifest
from sigmab_plugin.models import cifar_resnet18
from sigmab_plugin.techniques.legonet import LegoNetConfig, expand_into, pack, save_packed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    arguments = {"num_classes": 10, "width": 0.125}
    dense = cifar_resnet18(**arguments).eval()
    x = torch.randn(16, 3, 16, 16)
    config = SigmaBConfig(levels=("layer3", "layer4"), head="fc", projection_dim=8)
    net = SigmaBPruner(dense, (x[:2],), calibration_data=[x], config=config).step().eval()
    save(net, folder)
    record_of(
        Namespace(model="cifar_resnet18", model_args=json.dumps(arguments), weights=None, argv=["compress"])
    ).write(folder)
    return folder, net


def test_export_writes_a_bundle_that_runs(
    saved: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, net = saved
    target = tmp_path / "bundle"
    words = [
        "export",
        str(folder),
        "--to",
        str(target),
        "--format",
        "torch",
        "--input-shape",
        "3,16,16",
        "--quiet",
    ]
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    manifest = read_manifest(target)
    assert printed == {"bundle": str(target), "format": "torch", "path_bytes": manifest.path_bytes()}
    assert sum(manifest.path_parameters().values()) == sum(net.parameter_counts().per_path.values())
    assert manifest.plan == json.loads(json.dumps(net.plan.to_dict()))
    x = torch.randn(6, 3, 16, 16)
    with torch.no_grad(), Runner(target) as runner:
        result = runner.run(x)
        np.testing.assert_allclose(result.logits, net(x).numpy(), atol=1e-5)
        np.testing.assert_array_equal(result.leaves, net.route(x).numpy())
    assert main(words) == 2  # it exists
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of --data and --input-shape"),
        (["--input-shape", "3x16"], "numbers above 0 and commas"),
        (["--input-shape", "3,-16,16"], "numbers above 0 and commas"),
        (["--input-shape", "4,16,16"], "node 'root' (backbone) cannot take inputs of shape (2, 4, 16, 16)"),
        (["--input-shape", "3,16,16", "--single-file"], "writes a file b.onnx"),
        (["--input-shape", "3,16,16", "--single-file", "--format", "openvino"], "writes a file b.xml"),
        (["--input-shape", "3,16,16", "--precision", "int8"], "give --data"),
        (["--input-shape", "3,16,16", "--single-file", "--packed"], "leave out"),
        (["--input-shape", "3,16,16", "--precision", "legonet"], "go together"),
    ],
)
def test_options_that_do_not_fit(
    saved: tuple[Path, Any],
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(saved[0]), "--to", str(tmp_path / "b"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_batches_to_calibrate_on_are_one_or_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "net", "--to", "b", "--calibration-batches", "-3"])
    assert "must be at least 1: -3" in capsys.readouterr().err


def test_a_single_file_is_not_replaced_unasked(
    saved: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.onnx").write_text("mine")
    words = ["export", str(saved[0]), "--to", str(tmp_path / "net.onnx"), "--single-file"]
    assert main([*words, "--input-shape", "3,16,16"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "net.onnx").read_text() == "mine"


def test_export_of_packed_weights(saved: tuple[Path, Any], tmp_path: Path) -> None:
    folder, net = saved
    packed = pack(net, LegoNetConfig(codebook_size=16, iterations=1))
    save_packed(packed, tmp_path / "net.legonet")
    target = tmp_path / "bundle"
    words = ["export", str(folder), "--to", str(target), "--format", "torch", "--input-shape", "3,16,16"]
    words += ["--precision", "legonet", "--legonet", str(tmp_path / "net.legonet"), "--quiet"]
    assert main(words) == 0
    expanded = expand_into(packed, net)
    x = torch.randn(6, 3, 16, 16)
    with torch.no_grad(), Runner(target) as runner:
        np.testing.assert_allclose(runner(x), expanded(x).numpy(), atol=1e-5)
        assert runner.statistics().bytes_read < 4 * sum(net.parameter_counts().per_path.values()) / 4
