"""After installation NNCF 2.x knows the techniques, with no import of ours, and third parties' too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = """
from dataclasses import dataclass
from typing import ClassVar
import copy
import torch
from sigmab_plugin.config import TechniqueConfig, option
from sigmab_plugin.techniques.base import Technique

@dataclass(frozen=True)
class ScaleConfig(TechniqueConfig):
    algorithm: ClassVar[str] = "scale_weights"
    factor: float = option(0.5, "every weight is multiplied by it", exclusiveMinimum=0.0)

def apply(model, config, context):
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.mul_(config.factor)
    return result

technique = Technique(ScaleConfig, apply)
"""


def run(code: str, *paths: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, paths), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nncf_validates_and_builds_without_an_import_of_ours(nncf_v2: Any) -> None:
    output = run(
        "import torch, nncf, sys\n"
        "from nncf import NNCFConfig\n"
        "NNCFConfig.from_dict({'compression': {'algorithm': 'sigmab', 'levels': ['a'], 'head': 'b'}})\n"
        "NNCFConfig.from_dict({'compression': [{'algorithm': 'sigmab', 'levels': ['a'], 'head': 'b'},\n"
        "                                      {'algorithm': 'quantization'}]})\n"
        "import nncf.torch\n"
        "from nncf.torch.algo_selector import PT_COMPRESSION_ALGORITHMS as registry\n"
        "print(registry.get('sigmab').__name__)\n"
    )
    assert output.split()[-1] == "SigmabBuilder"


def test_switch_off(nncf_v2: Any) -> None:
    output = run(
        "import torch, nncf\nprint('sigmab' in nncf.NNCFConfig.schema()['$defs'])\n",
        SIGMAB_AUTOLOAD="0",
    )
    assert output.split()[-1] == "False"


def test_third_party_package_is_registered(nncf_v2: Any, tmp_path: Path) -> None:
    (tmp_path / "scale_weights.py").write_text(PACKAGE)
    info = tmp_path / "scale_weights-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scale-weights\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nncf.algorithms]\nscale_weights = scale_weights:technique\n")
    output = run(
        "import torch\n"
        "from nncf import NNCFConfig\n"
        "from nncf.torch import create_compressed_model\n"
        "model = torch.nn.Sequential(torch.nn.Linear(3, 2)); before = model[0].weight.clone()\n"
        "config = NNCFConfig.from_dict({'input_info': {'sample_size': [1, 3]},\n"
        "    'compression': [{'algorithm': 'scale_weights', 'factor': 0.25}, {'algorithm': 'magnitude_sparsity'}]})\n"
        "controller, network = create_compressed_model(model, config, dump_graphs=False)\n"
        "assert torch.equal(network[0].weight, before * 0.25) and torch.equal(model[0].weight, before)\n"
        "print(controller.statistics().to_str())\n"
        "try: NNCFConfig.from_dict({'compression': {'algorithm': 'scale_weights', 'factor': -1}})\n"
        "except Exception as error: print(error)\n",
        tmp_path,
    )
    assert "Statistics of scale_weights" in output
    assert "scale_weights: factor must be more than 0" in output


def test_importing_nncf_loads_no_technique(nncf_v2: Any) -> None:
    output = run(
        "import torch, sys, nncf.torch\n"
        "print([n for n in sys.modules if n.startswith('sigmab_plugin.techniques.') and n.count('.') == 2])\n"
        "nncf.NNCFConfig.schema()\n"
        "print('sigmab_plugin.techniques.legonet' in sys.modules)\n"
    )
    before, after = output.splitlines()[-2:]
    assert set(eval(before)) <= {"sigmab_plugin.techniques.base", "sigmab_plugin.techniques.compose"}
    assert after == "True"


def test_register_twice_changes_nothing(nncf_v2: Any) -> None:
    from nncf import NNCFConfig

    from sigmab_plugin.hosts import nncf_v2 as host

    host.register()
    validate, schema = NNCFConfig.validate, NNCFConfig.schema
    host.register()
    assert NNCFConfig.validate is validate
    assert NNCFConfig.schema is schema
    schema()
    single, several = schema()["properties"]["compression"]["oneOf"]
    for choices in (single["oneOf"], several["items"]["oneOf"]):
        assert choices.count({"$ref": "#/$defs/sigmab"}) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared_ration": 0.5}, "unknown key 'shared_ration'. Did you mean 'shared_ratio'?"),
        ({"shared_ratio": 1.5}, "shared_ratio must be at most 1.0; got 1.5"),
        ({"levels": "layer3"}, "levels has the wrong type"),
        ({"levels": []}, "'levels' is missing"),
    ],
    ids=["unknown key", "out of bounds", "wrong type", "missing"],
)
def test_from_json_names_the_key(
    nncf_v2: Any, tmp_path: Path, sections: Any, change: Any, words: str
) -> None:
    import jsonschema
    from nncf import NNCFConfig

    path = tmp_path / "nncf.json"
    path.write_text(json.dumps({"compression": [{**sections["sigmab"], **change}, sections["quantization"]]}))
    with pytest.raises(jsonschema.ValidationError) as caught:
        NNCFConfig.from_json(str(path))
    assert words in str(caught.value)
    assert "compression[0] (sigmab)" in str(caught.value)


def test_sections_of_nncf_alone_are_validated_as_before(nncf_v2: Any) -> None:
    import jsonschema
    from nncf import NNCFConfig

    NNCFConfig.from_dict({"compression": {"algorithm": "quantization", "preset": "mixed"}})
    with pytest.raises(jsonschema.ValidationError):
        NNCFConfig.from_dict({"compression": {"algorithm": "quantization", "no_such_key": 1}})
