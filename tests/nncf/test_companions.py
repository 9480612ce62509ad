"""The companions' sections of a config file, on the path of the installed NNCF: carried out, saved, read again."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sigmab_plugin
from sigmab_plugin import SigmaBNet
from sigmab_plugin.cli import main
from sigmab_plugin.errors import CalibrationError, SigmaBError
from sigmab_plugin.hosts.nncf_file import Compressed, compress_from_file
from sigmab_plugin.techniques.depth_pruning import depth_prune, load_depth_pruned
from sigmab_plugin.techniques.legonet import load_packed, read_packed

SECTIONS: dict[str, dict[str, Any]] = {
    "sigmab": {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "projection_dim": 8},
    "shallow": {"algorithm": "sigmab", "levels": ["layer2"], "head": "auxiliary_head", "projection_dim": 8},
    "legonet": {"algorithm": "legonet", "codebook_size": 16, "reestimate_batchnorm": True},
    "depth_pruning": {
        "algorithm": "depth_pruning", "cut": "layer2", "epochs": [1], "learning_rates": [0.01], "head_widths": [8],
    },
    "leaves": {"algorithm": "depth_pruning", "epochs": [1], "learning_rates": [0.01], "head_widths": [8]},
    "sweep": {
        "algorithm": "depth_pruning", "epochs": [1], "learning_rates": [0.01], "head_widths": [],
        "latency_repeats": 1, "max_drop": 1.0,
    },
    "mix_and_match": {
        "algorithm": "mix_and_match", "criteria": ["magnitude"], "scores": ["magnitude"],
        "strategies": ["min", "max"], "finetune_epochs": 1, "small_layer_parameters": 0,
    },
}  # fmt: skip
LISTS = (
    ("legonet",),
    ("depth_pruning",),
    ("sweep",),
    ("mix_and_match",),
    ("sigmab", "legonet"),
    ("sigmab", "mix_and_match"),
    ("sigmab", "leaves"),
    ("depth_pruning", "legonet"),
    ("depth_pruning", "shallow"),
)
each_list = pytest.mark.parametrize("names", LISTS, ids="-".join)
DIGITS = ("cifar_resnet18", {"num_classes": 10, "width": 0.0625, "in_channels": 1})


@pytest.fixture(autouse=True)
def installed(nncf_major: int, request: Any) -> None:
    """NNCF can carry config files out in this process."""
    request.getfixturevalue("nncf_v2" if nncf_major == 2 else "nncf_functions")


@pytest.fixture
def validate(data: Any) -> Any:
    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(data[0]).argmax(1) == data[1]).float().mean())

    return accuracy


def listed(*names: str) -> list[dict[str, Any]]:
    return [copy.deepcopy(SECTIONS[name]) for name in names]


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Weight matrices and kernels."""
    return {name: value for name, value in network.named_parameters() if value.ndim > 1}


def check_result(names: tuple[str, ...], network: nn.Module, images: torch.Tensor) -> None:
    """What the last section of ``names`` promises, on the network that came out."""
    network.eval()
    with torch.no_grad():
        output = network(images)
    assert output.shape == (len(images), 4)
    assert bool(output.isfinite().all())
    assert isinstance(network, SigmaBNet) == ("sigmab" in names or "shallow" in names)
    if "depth_pruning" in names or "sweep" in names:
        assert not any(name.startswith(("layer3", "layer4")) for name, _ in network.named_parameters())
    if names[-1] == "legonet":
        packed: Any = network.legonet
        for name, entry in packed.tensors.items():
            assert torch.equal(weights(network)[name], entry.expand(packed.codebook, 4)), name
    if names[-1] == "mix_and_match":
        table: Any = network.mix_and_match
        chosen = next(run for run in table["runs"] if f"{run['score']}-{run['strategy']}" == table["chosen"])
        zeros = sum(int((value == 0).sum()) for value in weights(network).values())
        assert zeros / sum(p.numel() for p in network.parameters()) == pytest.approx(
            chosen["sparsity"], abs=0.02
        )
        assert chosen["sparsity"] > 0.3
    if names[-1] == "leaves":
        assert isinstance(network, SigmaBNet)
        assert network.plan.shortened is not None


@each_list
def test_through_nncfs_own_entry(
    names: tuple[str, ...], nncf_major: int, dense: nn.Module, data: Any, loader: Any, config_of: Any, validate: Any
) -> None:  # fmt: skip
    config = config_of(*listed(*names))
    before = copy.deepcopy(dense.state_dict())
    if nncf_major == 2:
        from nncf import NNCFConfig
        from nncf.torch import create_compressed_model, register_default_init_args

        registered = register_default_init_args(NNCFConfig.from_dict(config), loader, model_eval_fn=validate)
        controller, network = create_compressed_model(dense, registered, dump_graphs=False)
        table = controller.statistics().to_str()
        assert all(section["algorithm"] in table.lower() for section in config["compression"])
    else:
        import nncf

        from sigmab_plugin.hosts import nncf_v3

        dataset = nncf.Dataset(loader, lambda batch: batch[0])
        network = nncf_v3.compress(dense, config, dataset, train_data=loader, validate=validate)
    check_result(names, network, data[0])
    assert type(dense).__name__ == "ResNet"
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def saved(result: Compressed, folder: Path) -> set[str]:
    files = {file.kind: file.path for file in result.save(folder)}
    assert all(path.stat().st_size > 0 for path in files.values())
    return {file.name for file in folder.iterdir()}


def read_again(names: tuple[str, ...], folder: Path, dense: nn.Module, images: torch.Tensor) -> nn.Module:
    """By the function that the documentation names for this network."""
    if "sigmab" in names:
        return sigmab_plugin.load(folder, dense)
    if "shallow" in names:
        shallow = SECTIONS["depth_pruning"]
        cut = depth_prune(dense, images[:1], cut=shallow["cut"], head_widths=shallow["head_widths"])
        return sigmab_plugin.load(folder, cut)
    if "depth_pruning" in names or "sweep" in names:
        return load_depth_pruned(folder / "model.safetensors", dense, images[:1])
    network = copy.deepcopy(dense)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network


@each_list
def test_saved_and_read_again(
    names: tuple[str, ...], nncf_major: int, dense: nn.Module, data: Any, loader: Any, config_of: Any,
    validate: Any, tmp_path: Path,
) -> None:  # fmt: skip
    images = data[0]
    result = compress_from_file(config_of(*listed(*names)), dense, calibration_data=loader, validate=validate)
    assert result.path.startswith(f"NNCF {nncf_major}.")
    check_result(names, result.network, images)
    for name in ("nncf.json", "compression_state.json", "legonet.safetensors", "mix_and_match.json"):
        (tmp_path / name).write_text("left by another network")
    expected = {"model.safetensors"}
    expected |= {"plan.json"} if "sigmab" in names or "shallow" in names else set()
    expected |= {"legonet.safetensors"} if names[-1] == "legonet" else set()
    expected |= {"mix_and_match.json"} if names[-1] == "mix_and_match" else set()
    assert saved(result, tmp_path) == expected
    again = read_again(names, tmp_path, dense, images).eval()
    with torch.no_grad():
        output = result.network(images)
        assert torch.equal(again(images), output)
        if names[-1] == "legonet":
            file = tmp_path / "legonet.safetensors"
            assert torch.equal(load_packed(file, again).eval()(images), output)
            assert read_packed(file).config.codebook_size == 16
    if names[-1] == "mix_and_match":
        table = json.loads((tmp_path / "mix_and_match.json").read_text())
        assert {run["strategy"] for run in table["runs"]} == {"min", "max"}


def test_what_a_section_did_counts_bytes(dense: nn.Module, loader: Any, config_of: Any) -> None:
    """On every NNCF the report of legonet and of a companion after sigmab has parameters and bytes."""
    result = compress_from_file(config_of(*listed("sigmab", "legonet")), dense, calibration_data=loader)
    facts = result.reports[1].facts
    assert facts["before"] == facts["after"] == result.reports[0].facts["stored"]
    assert facts["form"] == "codebook"
    assert facts["bytes"] < facts["bytes_before"] / 4
    assert f"{facts['bytes']:,} after as a codebook" in result.reports[1].text


def test_weights_trained_after_legonet_are_not_packed(
    dense: nn.Module, loader: Any, config_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(network: nn.Module, _: Any) -> None:
        with torch.no_grad():
            network.get_submodule("layer1.0.conv1").weight.add_(0.01)  # type: ignore[operator]

    result = compress_from_file(
        config_of(*listed("legonet")), dense, calibration_data=loader, fine_tune=train
    )
    with caplog.at_level(logging.WARNING):
        assert saved(result, tmp_path) == {"model.safetensors"}
    assert "no legonet.safetensors: 1 of" in caplog.text
    assert "layer1.0.conv1.weight" in caplog.text


@pytest.mark.parametrize(
    ("names", "missing", "words"),
    [
        (("mix_and_match",), "validate", "compression[0] (mix_and_match) chooses among its runs and needs validate"),
        (("sigmab", "mix_and_match"), "validate", "compression[1] (mix_and_match) chooses among its runs"),
        (("sweep",), "validate", "compression[0] (depth_pruning) names no cut and chooses one and needs validate"),
        (("sigmab", "mix_and_match"), "data", "compression[1] (mix_and_match) fine-tunes every run and needs train"),
        (("legonet",), "data", "compression[0] (legonet) re-estimates BatchNorm statistics and needs calibration"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_the_first_section(
    names: tuple[str, ...], missing: str, words: str, nncf_major: int, dense: nn.Module, loader: Any,
    config_of: Any, validate: Any,
) -> None:  # fmt: skip
    config = config_of(*listed(*names))
    given: dict[str, Any] = {"calibration_data": loader} if missing == "validate" else {"validate": validate}
    reports: list[Any] = []
    with pytest.raises(CalibrationError) as caught:
        compress_from_file(config, dense, on_section=reports.append, **given)
    assert words in str(caught.value)
    assert (
        f"pass {'validate' if missing == 'validate' else str(caught.value).split('needs ')[1].split(':')[0]}="
        in (str(caught.value))
    )
    if nncf_major == 2:
        from nncf import NNCFConfig
        from nncf.torch import create_compressed_model, register_default_init_args

        own = NNCFConfig.from_dict(config)
        if missing == "validate":
            own = register_default_init_args(own, loader)
            words = words.split(" and needs")[0]
        else:
            words = "register_default_init_args(config, train_loader"
        with pytest.raises(SigmaBError) as caught:
            create_compressed_model(dense, own, dump_graphs=False)
    else:
        from sigmab_plugin.hosts import nncf_v3

        data = loader if missing == "validate" else None
        inputs = None if data is None else [batch[0] for batch in data]
        with pytest.raises(CalibrationError) as caught:
            nncf_v3.compress(
                dense, config, inputs, example_inputs=torch.zeros(1, 3, 16, 16), train_data=data,
                on_section=reports.append, validate=None if missing == "validate" else validate,
            )  # fmt: skip
    assert words in str(caught.value)
    assert reports == []
    assert type(dense).__name__ == "ResNet"
    assert type(dense.get_submodule("conv1")) is nn.Conv2d


def test_training_data_and_loss_of_their_own(dense: nn.Module, loader: Any, config_of: Any) -> None:
    """What is given as train_data and loss_fn is what a technique trains with, on every path."""
    seen: list[int] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(targets))
        return nn.functional.cross_entropy(outputs, targets)

    images, targets = next(iter(loader))
    train = [(images[:6], targets[:6])] * 2
    compress_from_file(
        config_of(*listed("depth_pruning")), dense, calibration_data=loader, train_data=train, loss_fn=loss
    )
    assert seen == [6, 6]


# ---------------------------------------------------------------- the command


def command(capsys: pytest.CaptureFixture[str], *words: str, expected: int = 0) -> tuple[dict[str, Any], str]:
    """Run in this process; (the JSON object on stdout, stderr)."""
    assert main([*words, "--json"]) == expected
    out, err = capsys.readouterr()
    return json.loads(out), err


def compress(capsys: pytest.CaptureFixture[str], folder: Path, *names: str) -> dict[str, Any]:
    config = folder / "config.json"
    config.write_text(json.dumps({"compression": listed(*names)}))
    model = ["--model", DIGITS[0], "--model-args", json.dumps(DIGITS[1]), "--threads", "1"]
    words = ["--data", "digits", "--samples", "64", "--config", str(config), "--out", str(folder / "out")]
    return command(capsys, "compress", *model, *words)[0]


@pytest.mark.parametrize(
    ("names", "kinds", "reader"),
    [
        (("legonet",), {"weights", "packed"}, "legonet.load_packed"),
        (("depth_pruning",), {"weights"}, "depth_pruning.load_depth_pruned"),
        (("sweep",), {"weights"}, "depth_pruning.load_depth_pruned"),
        (("mix_and_match",), {"weights", "runs"}, "load_state_dict"),
    ],
    ids=["legonet", "depth_pruning", "sweep", "mix_and_match"],
)
def test_command_without_a_tree(
    names: tuple[str, ...], kinds: set[str], reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = compress(capsys, tmp_path, *names)
    assert set(record["files"]) == {"network", *kinds}
    assert all(Path(file).exists() for file in record["files"].values())
    assert (record["validation_samples"] > 0) == (names[0] in ("sweep", "mix_and_match"))
    out = record["files"]["network"]
    result, _ = command(capsys, "evaluate", out, "--data", "digits", "--threads", "1")
    (row,) = result["networks"]
    assert (row["name"], row["role"]) == ("compressed", "other")
    assert 0 <= row["accuracy"] <= 1
    if reader == "depth_pruning.load_depth_pruned":
        assert row["stored_parameters"] < 10_000
    error, _ = command(capsys, "inspect", out, expected=2)
    assert "not a saved SigmaB net" in error["message"]
    assert reader in error["message"]


@pytest.mark.slow
def test_command_packs_a_tree_for_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = compress(capsys, tmp_path, "sigmab", "legonet")
    out, packed = record["files"]["network"], record["files"]["packed"]
    assert record["validation_samples"] == 0
    nodes, _ = command(capsys, "inspect", out)
    assert len(nodes["leaves"]) == 4
    words = ["--format", "torch", "--precision", "legonet", "--legonet", packed, "--input-shape", "1,8,8"]
    bundle, _ = command(capsys, "export", out, *words, "--to", str(tmp_path / "bundle"), "--threads", "1")
    assert 0 < max(bundle["path_bytes"].values()) < Path(record["files"]["weights"]).stat().st_size / 8


def test_command_holds_samples_out_to_choose_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sigmab_plugin import data

    record = compress(capsys, tmp_path, "sigmab", "mix_and_match")
    _, held = data.split_validation(data.digits("train"), fraction=0.1, seed=0)
    assert record["validation_samples"] == len(held)
    assert [entry["section"] for entry in record["sections"]] == [
        "compression[0] (sigmab)",
        "compression[1] (mix_and_match)",
    ]
    scores = [run["validation"] for run in json.loads(Path(record["files"]["runs"]).read_text())["runs"]]
    assert all(round(score * len(held)) == pytest.approx(score * len(held)) for score in scores)
    result, _ = command(capsys, "evaluate", record["files"]["network"], "--data", "digits", "--threads", "1")
    assert [row["role"] for row in result["networks"]] == ["sigmab"]


def test_command_without_samples_to_hold_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    np.savez(
        tmp_path / "data.npz", x=np.zeros((3, 8, 8, 1), np.uint8), y=np.arange(3), classes=np.array(list("abc"))
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"compression": listed("sigmab", "mix_and_match")}))
    model = ["--model", DIGITS[0], "--model-args", json.dumps(DIGITS[1])]
    words = ["--data", str(tmp_path / "data.npz"), "--config", str(config), "--out", str(tmp_path / "out")]
    error, _ = command(capsys, "compress", *model, *words, expected=2)
    assert "compression[1] (mix_and_match) chooses on held-out samples" in error["message"]
    assert "two labelled samples of every class" in error["message"]
    assert not (tmp_path / "out").exists()
