from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sigmab_plugin.cli import build_parser
from sigmab_plugin.cli.finetune import read_recipe
from sigmab_plugin.cli.measure import check_fit
from sigmab_plugin.cli.options import build_model, load_weights, read_sections
from sigmab_plugin.errors import ConfigError, FormatError, ModelError
from sigmab_plugin.tuning.recipe import as_recipe


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("nesting", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_the_usual_forms_load(nesting: str | None, prefix: str, tmp_path: Path) -> None:
    source = net()
    state: object = {prefix + name: value for name, value in source.state_dict().items()}
    torch.save(state if nesting is None else {nesting: state, "epoch": 3}, tmp_path / "w.pth")
    target = net()
    load_weights(target, tmp_path / "w.pth")
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_safetensors_load(tmp_path: Path) -> None:
    source = net()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = net()
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target[0].weight, source[0].weight)


class Payload:
    """Would create a file if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["SIGMAB_TEST_PAYLOAD"],)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGMAB_TEST_PAYLOAD", str(tmp_path / "owned"))
    torch.save({"weights": Payload()}, tmp_path / "w.pth")
    with pytest.raises(FormatError, match="cannot be read as plain weights"):
        load_weights(net(), tmp_path / "w.pth")
    assert not (tmp_path / "owned").exists()


def test_weights_that_do_not_fit_name_tensors(tmp_path: Path) -> None:
    state = net().state_dict()
    state["0.weight"] = torch.zeros(5, 3)
    state["extra"] = state.pop("0.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ModelError, match=r"1 missing: 0\.bias; 1 unexpected: extra; 1 of another shape: 0\.weight"
    ):
        load_weights(net(), tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_without_counts_of_batches_loads(prefix: str, tmp_path: Path) -> None:
    """Torch itself takes it: older releases did not count them."""
    source = net()
    state = {prefix + name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    target = net()
    load_weights(target, tmp_path / "old.pth")
    assert torch.equal(target[1].running_var, source[1].running_var)
    assert torch.equal(target[0].weight, source[0].weight)
    del state[prefix + "1.running_mean"]
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(ModelError, match=r"1 missing: 1\.running_mean"):
        load_weights(net(), tmp_path / "old.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"not weights at all")
    with pytest.raises(FormatError, match=path.name):
        load_weights(net(), path)


def test_a_users_module_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_net_for_sigmab.py").write_text(
        "from torch import nn\ndef make(width):\n    return nn.Linear(width, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    model = build_model("my_net_for_sigmab:make", {"width": 4})
    assert model.weight.shape == (1, 4)
    with pytest.raises(ConfigError, match="has no 'other'"):
        build_model("my_net_for_sigmab:other", {})


@pytest.mark.parametrize(
    "content",
    [
        '{"algorithm": "sigmab", "head": "fc"}',
        '{"compression": {"algorithm": "sigmab", "head": "fc"}}',
        '{"input_info": {"sample_size": [1, 3, 8, 8]}, "compression": [{"algorithm": "sigmab", "head": "fc"}]}',
    ],
)
def test_one_section_in_three_forms(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    sections, info = read_sections(path)
    assert sections == [{"algorithm": "sigmab", "head": "fc"}]
    assert info == ({"sample_size": [1, 3, 8, 8]} if "input_info" in content else None)


def test_recipes_of_finetune(tmp_path: Path) -> None:
    """Without --recipe it is the library's default; a file's missing fields are the paper's."""
    (tmp_path / "own.json").write_text('{"momentum": 0.5}')

    def recipe(*options: str):
        required = ["finetune", "tree", "--data", "digits", "--out", "tuned"]
        return read_recipe(build_parser().parse_args([*required, *options]))

    assert recipe("--batch-size", "256") == as_recipe("default")
    assert recipe() == as_recipe("default").replace(lr=0.025, batch_size=64)
    assert recipe("--epochs", "3").warmup_epochs == pytest.approx(0.3)
    assert recipe("--recipe", "modelnet40", "--batch-size", "64") == as_recipe("modelnet40")
    assert recipe("--recipe", "cifar100", "--lr", "0.5").lr == 0.5
    own = recipe("--recipe", str(tmp_path / "own.json"), "--distill", "2")
    assert own == as_recipe("imagenet").replace(momentum=0.5, distillation_weight=2.0)


class _Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError(), "ValueError"),
        (AssertionError("four channels"), "four channels"),
        (KeyError("x"), "'x'"),
        (RuntimeError("\n\nthe second line"), "the second line"),
    ],
)
def test_a_model_that_does_not_take_the_data(error: Exception, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"one sample of digits, shape \(1, 3\): {reason}$"):
        check_fit(_Fails(error), torch.zeros(1, 3), 2, "digits")
