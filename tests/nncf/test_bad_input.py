"""What cannot work is refused with a message that says what to do, before the model is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sigmab_plugin.errors import CalibrationError, ConfigError, MissingDependencyError, ModelError

Attempt = Callable[..., None]


@pytest.fixture(params=["2.x", "functions"])
def attempt(request: Any, nncf_major: int, config_of: Any, loader: Any) -> Attempt:
    """Run a config file the way of the installed NNCF."""
    if request.param == "2.x":
        nncf_torch = request.getfixturevalue("nncf_v2")
        from nncf import NNCFConfig

        def by_config(
            model: nn.Module, *sections: dict[str, Any], calibrated: bool = True, **top: Any
        ) -> None:
            config = NNCFConfig(
                config_of(*sections, **top)
            )  # not from_dict: the file may skip NNCF's validation
            if calibrated:
                config = nncf_torch.register_default_init_args(config, loader)
            nncf_torch.create_compressed_model(model, config, dump_graphs=False)

        return by_config
    nncf = request.getfixturevalue("nncf_functions")
    from sigmab_plugin.hosts import nncf_v3

    def by_functions(
        model: nn.Module, *sections: dict[str, Any], calibrated: bool = True, **top: Any
    ) -> None:
        dataset = nncf.Dataset(loader, lambda batch: batch[0]) if calibrated else None
        nncf_v3.compress(model, config_of(*sections, **top), dataset)

    return by_functions


def refused(
    attempt: Attempt, model: nn.Module, kind: type[Exception], words: str, *sections: Any, **top: Any
) -> None:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    with pytest.raises(kind) as caught:
        attempt(model, *sections, **top)
    for word in words.split(" | "):
        assert word in str(caught.value)
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == modules
    assert all((model.state_dict()[name] == tensor).all() for name, tensor in weights.items())
    assert model.state_dict().keys() == weights.keys()


def test_sigmab_twice(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    words = "sigmab stands in the list twice: compression[0] (sigmab) and compression[1] (sigmab)"
    refused(attempt, dense, ConfigError, words, sections["sigmab"], sections["sigmab"])


def test_sigmab_after_quantization(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    words = (
        'Put \'sigmab\' before \'quantization\' | [{"algorithm": "sigmab", ...}, {"algorithm": "quantization"'
    )
    refused(attempt, dense, ConfigError, words, sections["quantization"], sections["sigmab"])


def test_missing_calibration_data(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    refused(attempt, dense, CalibrationError, "calibration", sections["sigmab"], calibrated=False)


@pytest.mark.parametrize(
    "scope",
    ["{re}layer4", "ResNet/Sequential[layer4]", "{re}ResNet/Sequential\\[layer4\\]/.*conv2d"],
    ids=["expression", "module", "2.x expression"],
)
def test_ignored_scopes_that_cover_a_level(
    attempt: Attempt, dense: nn.Module, sections: Any, scope: str
) -> None:
    words = "ignored_scopes cover 'layer4' | move them into the section"
    refused(
        attempt,
        dense,
        ConfigError,
        words,
        sections["sigmab"],
        sections["quantization"],
        ignored_scopes=[scope],
    )


def test_unknown_key(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    section = {**sections["sigmab"], "projection": 4}
    refused(attempt, dense, ConfigError, "unknown key 'projection'. Did you mean 'projection_dim'?", section)


def test_config_for_another_model(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    section = {**sections["sigmab"], "levels": ["layer3", "sa3"]}
    words = "ResNet has no module 'sa3' | Is this config for another model?"
    refused(attempt, dense, ConfigError, words, section, sections["quantization"])


def test_masks_that_need_training_before_sigmab(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    section = {"algorithm": "rb_sparsity"}
    refused(attempt, dense, ConfigError, "finds its masks during training", section, sections["sigmab"])


def test_one_shot_calibration_data(
    nncf_functions: Any, dense: nn.Module, config_of: Any, loader: Any, sections: Any
) -> None:
    from sigmab_plugin.hosts import nncf_v3

    with pytest.raises(CalibrationError, match="one-shot iterator"):
        nncf_v3.compress(dense, config_of(sections["sigmab"]), iter(loader))


def test_calibration_data_with_targets(
    nncf_functions: Any, dense: nn.Module, config_of: Any, loader: Any, sections: Any
) -> None:
    from sigmab_plugin.hosts import nncf_v3

    with pytest.raises(
        CalibrationError, match=r"inputs alone.* nncf\.Dataset\(loader, lambda batch: batch\[0\]\)"
    ):
        nncf_v3.compress(dense, config_of(sections["sigmab"]), nncf_functions.Dataset(loader))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"algorithm": "const_sparsity"}, "not available through NNCF's functions"),
        ({"algorithm": "no_such"}, "not available through NNCF's functions"),
        ({"algorithm": "quantization", "presett": "mixed"}, "unknown key 'presett'"),
        ({"algorithm": "quantization", "preset": "fast"}, "preset must be 'performance' or 'mixed'"),
        ({"algorithm": "quantization", "weights": {"bits": 4}}, "8 bits only"),
        ({"algorithm": "weight_compression", "mode": "int9"}, "mode must be one of"),
        (
            {"algorithm": "filter_pruning", "params": {"pruning_flops_target": 0.4}},
            "use params.pruning_target",
        ),
        ({"algorithm": "filter_pruning", "params": {"pruning_target": 1.4}}, "between 0 and 1"),
        ({"algorithm": "magnitude_sparsity", "params": {"sparsity_target": 0.0}}, "between 0 and 1"),
    ],
    ids=lambda value: value["algorithm"] if isinstance(value, dict) else "",
)
def test_sections_that_the_functions_cannot_carry_out(
    nncf_functions: Any, dense: nn.Module, config_of: Any, loader: Any, section: Any, words: str
) -> None:
    from sigmab_plugin.hosts import nncf_v3

    dataset = nncf_functions.Dataset(loader, lambda batch: batch[0])
    if section["algorithm"] == "magnitude_sparsity" and not hasattr(nncf_functions, "prune"):
        pytest.skip("this NNCF has no nncf.prune")
    with pytest.raises(ConfigError) as caught:
        nncf_v3.compress(dense, config_of(section), dataset)
    assert words in str(caught.value)


def test_filter_pruning_after_sigmab(attempt: Attempt, dense: nn.Module, sections: Any) -> None:
    words = "the branches have been cut to their width already | Put 'filter_pruning' before 'sigmab'"
    refused(attempt, dense, ConfigError, words, sections["sigmab"], sections["pruning"])


def test_filter_pruning_of_a_tree(
    nncf_functions: Any, dense: nn.Module, config_of: Any, loader: Any, sections: Any
) -> None:
    from sigmab_plugin.hosts import nncf_v3

    dataset = nncf_functions.Dataset(loader, lambda batch: batch[0])
    tree = nncf_v3.compress(dense, config_of(sections["sigmab"]), dataset)
    with pytest.raises(ConfigError, match="filter_pruning before sigmab in one file"):
        nncf_v3.compress(tree, config_of(sections["pruning"]), dataset)


def test_a_tree_is_not_restructured_again(
    nncf_functions: Any, dense: nn.Module, config_of: Any, loader: Any, sections: Any
) -> None:
    from sigmab_plugin.hosts import nncf_v3

    dataset = nncf_functions.Dataset(loader, lambda batch: batch[0])
    net = nncf_v3.compress(dense, config_of(sections["sigmab"]), dataset)
    with pytest.raises(ModelError, match="is a SigmaB net already"):
        nncf_v3.compress(net, config_of(sections["sigmab"]), dataset)


def test_legacy_tracing_switched_off(nncf_major: int, tmp_path: Path, sections: Any, config_of: Any) -> None:
    from sigmab_plugin.hosts.nncf_schema import nncf_version

    if not (2, 17) <= nncf_version() < (3, 0):
        pytest.skip("legacy tracing is chosen in NNCF 2.17 to 2.19")
    (tmp_path / "nncf.json").write_text(json.dumps(config_of(sections["sigmab"])))
    code = (
        "import nncf.torch, sys, torch\n"
        "from sigmab_plugin.errors import ConfigError\n"
        "from sigmab_plugin.hosts.nncf_file import compress_from_file\n"
        "from sigmab_plugin.models import cifar_resnet18\n"
        "model = cifar_resnet18(4, width=1 / 16)\n"
        "try:\n"
        "    batches = [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))]\n"
        "    compress_from_file(sys.argv[1], model, calibration_data=batches)\n"
        "except ConfigError as error:\n"
        "    assert type(model.conv1) is torch.nn.Conv2d\n"
        "    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NNCF_TORCH_LEGACY_TRACING"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "nncf.json")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "Set NNCF_TORCH_LEGACY_TRACING=1 before the process imports nncf" in done.stdout, done.stderr[
        -1500:
    ]


def test_nncf_without_its_torch_backend(nncf_major: int, tmp_path: Path) -> None:
    """A broken ``nncf.torch`` is reported by NNCF's own import; ``import nncf`` itself keeps working."""
    code = (
        "import sys\n"
        "import torch\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'nncf.torch':\n"
        "            raise ImportError('nncf.torch is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import nncf\n"
        "try:\n"
        "    import nncf.torch\n"
        "except ImportError as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "refused: nncf.torch is blocked" in done.stdout, done.stderr[-1500:]


def test_files(tmp_path: Path) -> None:
    from sigmab_plugin.hosts.nncf_schema import check, read

    with pytest.raises(ConfigError, match="cannot read the config file"):
        read(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text('{"compression": [}')
    with pytest.raises(ConfigError, match="is no JSON: line 1"):
        read(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        read(tmp_path / "list.json")
    with pytest.raises(ConfigError, match=r"compression\[1\] must be an object"):
        check({"compression": [{"algorithm": "quantization"}, "sigmab"]})


def test_nncf_absent(
    dense: nn.Module, loader: Any, config_of: Any, sections: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sigmab_plugin import SigmaBNet
    from sigmab_plugin.hosts import nncf_file

    def absent() -> Any:
        raise MissingDependencyError("NNCF is not installed")

    monkeypatch.setattr(nncf_file, "nncf_version", absent)
    result = nncf_file.compress_from_file(config_of(sections["sigmab"]), dense, calibration_data=loader)
    assert isinstance(result.network, SigmaBNet)
    assert result.path == nncf_file.NO_NNCF
    with pytest.raises(MissingDependencyError, match=r"compression\[0\] \(quantization\) needs NNCF"):
        nncf_file.compress_from_file(config_of(sections["quantization"]), dense, calibration_data=loader)
