"""``sigmab compress --config`` with NNCF's config files, through the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sigmab_plugin.cli import main
from sigmab_plugin.errors import MissingDependencyError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "nncf").glob("*.json"))
#: A model with the module names of the file's, and its data. Narrow, so that a run takes seconds.
RESNET = ("cifar_resnet50", {"num_classes": 4, "width": 0.0625})
POINTS = ("PointNet2", {"num_classes": 4})
DIGITS = ("cifar_resnet18", {"num_classes": 10, "width": 0.0625, "in_channels": 1})


def run(*words: str, command: str = "compress") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which has not imported NNCF."""
    env = {key: value for key, value in os.environ.items() if key != "NNCF_TORCH_LEGACY_TRACING"}
    code = "import sys; from sigmab_plugin.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, command, *words, "--threads", "1"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )


def model_options(spec: tuple[str, dict[str, Any]]) -> list[str]:
    return ["--model", spec[0], "--model-args", json.dumps(spec[1])]


def write_data(folder: Path, *, points: bool) -> Path:
    generator = np.random.default_rng(0)
    labels = np.arange(32) % 4
    file = folder / "data.npz"
    if points:
        clouds = generator.uniform(-1, 1, (32, 1024, 3)) * generator.uniform(0.3, 1.0, (32, 1, 3))
        np.savez(file, points=clouds.astype(np.float32), labels=labels, classes=np.array(list("abcd")))
    else:
        images = generator.integers(0, 255, (32, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
        np.savez(file, x=images.astype(np.uint8), y=labels)
    return file


def write_config(folder: Path, *sections: dict[str, Any], **top: Any) -> Path:
    file = folder / "nncf.json"
    file.write_text(json.dumps({"compression": list(sections), **top}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(path: Path, nncf_major: int, tmp_path: Path) -> None:
    points = path.stem.startswith("pointnet2")
    if points:
        pytest.importorskip("torch_geometric")
    listed = json.loads(path.read_text())["compression"]
    names = [section["algorithm"] for section in (listed if isinstance(listed, list) else [listed])]
    data, out = write_data(tmp_path, points=points), tmp_path / "out"
    words = [*model_options(POINTS if points else RESNET), "--data", str(data), "--batch-size", "8"]
    done = run(*words, "--config", str(path), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    assert (out / "model.safetensors").stat().st_size > 0
    assert (out / "sigmab.json").exists()
    if names == ["sigmab"]:  # needs no NNCF, and is not carried out by it
        assert [row["role"] for row in record["networks"]] == ["dense", "sigmab"]
        return
    expected = (
        "create_compressed_model" if nncf_major == 2 and "weight_compression" not in names else "functions"
    )
    assert record["path"].startswith(f"NNCF {nncf_major}.")
    assert record["path"].endswith(expected)
    assert [entry["section"] for entry in record["sections"]] == [
        f"compression[{number}] ({name})" for number, name in enumerate(names)
    ]
    assert all(entry["text"] and "\n" not in entry["text"] for entry in record["sections"])
    tree = record["sections"][names.index("sigmab")]
    assert "active" in tree["text"]


@pytest.mark.slow
def test_saved_network_is_read_again(nncf_major: int, tmp_path: Path, sections: Any, request: Any) -> None:
    """The folder holds all that NNCF's own loading needs: the same outputs come back, bit for bit."""
    from safetensors.torch import load_file

    from sigmab_plugin.models import cifar_resnet18

    config = write_config(
        tmp_path, sections["sigmab"], sections["quantization"], input_info={"sample_size": [1, 1, 8, 8]}
    )
    out = tmp_path / "out"
    words = ["--data", "digits", "--samples", "64", "--config", str(config), "--out", str(out)]
    done = run(*model_options(DIGITS), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"NNCF {nncf_major}.")
    assert lines[0].startswith("compression[0] (sigmab): ")
    assert lines[1].startswith("compression[1] (quantization): ")
    dense = cifar_resnet18(**DIGITS[1]).eval()
    images = torch.rand(8, 1, 8, 8)
    if nncf_major == 2:
        nncf_torch = request.getfixturevalue("nncf_v2")
        from nncf import NNCFConfig

        state = json.loads((out / "compression_state.json").read_text())
        restored = [
            nncf_torch.create_compressed_model(
                dense, NNCFConfig.from_json(str(config)), compression_state=state, dump_graphs=False
            )[1]
            for _ in range(2)
        ]
        for network in restored:
            network.load_state_dict(load_file(out / "model.safetensors"))
            network.eval()
    else:
        request.getfixturevalue("nncf_functions")
        from sigmab_plugin.hosts import nncf_v3

        restored = [nncf_v3.load(out, dense) for _ in range(2)]
    weights = load_file(out / "model.safetensors")
    own = restored[0].state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())
    with torch.no_grad():
        assert torch.equal(restored[0](images), restored[1](images))
    evaluated = run(str(out), "--data", "digits", command="evaluate")
    if nncf_major == 2:
        assert evaluated.returncode == 2
        assert "was written by NNCF 2.x: read it with create_compressed_model" in evaluated.stderr
    else:
        assert evaluated.returncode == 0, evaluated.stderr[-3000:]
        assert "SigmaB" in evaluated.stdout
    assert any("quantiz" in type(module).__name__.lower() for module in restored[0].modules())


@pytest.mark.slow
def test_options_change_the_section_and_another_output_is_replaced(
    nncf_major: int, tmp_path: Path, sections: Any
) -> None:
    pruning = {**sections["sparsity"], "params": {"sparsity_target": 0.5}}
    config = write_config(tmp_path, sections["sigmab"], pruning)
    out = tmp_path / "out"
    out.mkdir()
    for name in ("plan.json", "nncf.json", "compression_state.json"):
        (out / name).write_text("{}")
    words = [*model_options(DIGITS), "--data", "digits", "--samples", "64", "--config", str(config)]
    done = run(*words, "--out", str(out), "--json", "--projection-dim", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    structure = {"plan.json", "nncf.json"} if nncf_major == 3 else {"compression_state.json"}
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "sigmab.json", *structure}
    holder = "plan.json" if nncf_major == 3 else "compression_state.json"
    assert '"projection_dim": 4' in (out / holder).read_text()


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["compress", *model_options(DIGITS), "--data", "digits", "--out", "unused", *words]) == 2
    return capsys.readouterr().err


def test_without_nncf(
    tmp_path: Path, sections: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sigmab_plugin.hosts import nncf_file

    def absent() -> Any:
        raise MissingDependencyError("NNCF is not installed")

    monkeypatch.setattr(nncf_file, "nncf_version", absent)
    config = write_config(tmp_path, sections["sigmab"], sections["quantization"])
    message = refusal(capsys, "--config", str(config))
    assert "compression[1] (quantization) needs NNCF, which is not installed" in message
    assert "pip install 'sigmab-plugin[nncf]'" in message
    config = write_config(tmp_path, sections["sigmab"], {"algorithm": "rb_sparsity"})
    assert "pip install 'nncf>=2.17,<3'" in refusal(capsys, "--config", str(config))
    # A tree alone, and a tree with techniques of this package, need no NNCF.
    out = tmp_path / "out"
    legonet = {"algorithm": "legonet"}
    for name, listed in (("tree", [sections["sigmab"]]), ("both", [sections["sigmab"], legonet])):
        config = write_config(tmp_path, *listed)
        words = ["--data", "digits", "--samples", "64", "--config", str(config), "--out", str(out / name)]
        assert main(["compress", *model_options(DIGITS), *words, "--json", "--threads", "1"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert (out / name / "plan.json").exists()
    assert record["path"] == nncf_file.NO_NNCF
    assert [entry["section"] for entry in record["sections"]] == [
        "compression[0] (sigmab)",
        "compression[1] (legonet)",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--twin"], "--twin stands beside a tree alone"),
        (["--preset", "resnet50"], "--config or --preset, not both"),
        (["--active-ratio", "0.5"], "--active-ratio: {config} has no sigmab section to change"),
    ],
    ids=["twin", "preset", "field"],
)
def test_options_without_use(
    tmp_path: Path, sections: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, sections["quantization"])
    assert message.format(config=config) in refusal(capsys, "--config", str(config), *words)


def test_section_that_the_installed_nncf_lacks(
    nncf_major: int, tmp_path: Path, sections: Any, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if nncf_major == 3:
        config = write_config(tmp_path, sections["sigmab"], {"algorithm": "const_sparsity"})
        message = refusal(capsys, "--config", str(config))
        assert "compression[1] (const_sparsity) is not available through NNCF 3." in message
        assert "pip install 'nncf>=2.17,<3'" in message
        return
    monkeypatch.setenv("NNCF_TORCH_LEGACY_TRACING", "1")
    config = write_config(tmp_path, sections["sigmab"], {"algorithm": "weight_compression"})
    message = refusal(capsys, "--config", str(config))
    assert "compression[1] (weight_compression) is in no config file of NNCF 2." in message
    assert "start the process without NNCF_TORCH_LEGACY_TRACING" in message or "nncf>=2.17" in message
