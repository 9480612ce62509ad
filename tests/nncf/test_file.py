"""Which way a file is carried out, and what it need not say. No NNCF is needed for these."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sigmab_plugin.errors import ConfigError
from sigmab_plugin.hosts import nncf_file
from sigmab_plugin.hosts.nncf_schema import check


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch, sections: Any) -> Any:
    monkeypatch.delenv(nncf_file.LEGACY_TRACING, raising=False)

    def make(version: tuple[int, int], *names: str) -> nncf_file.Way:
        monkeypatch.setattr(nncf_file, "nncf_version", lambda: version)
        listed = [sections.get(name, {"algorithm": name}) for name in names]
        return nncf_file.way_of(check({"compression": listed}))

    return make


def test_way_follows_the_installed_nncf_and_the_sections(way: Any) -> None:
    assert way((2, 19), "sigmab", "quantization").name == "NNCF 2.19: create_compressed_model"
    assert way((2, 17), "sigmab", "rb_sparsity").kind == "config file"
    assert way((3, 4), "sigmab", "quantization").name == "NNCF 3.4: functions"
    chosen = way((2, 19), "sigmab", "weight_compression")
    assert str(chosen) == (
        "NNCF 2.19: functions (config files of NNCF 2.x have no weight_compression, its functions do)"
    )


@pytest.mark.parametrize(
    ("version", "name", "words"),
    [
        ((2, 16), "weight_compression", "is in no config file of NNCF 2.16: pip install 'nncf>=2.17'"),
        ((3, 0), "rb_sparsity", "is not available through NNCF 3.0's functions"),
    ],
)
def test_section_of_another_nncf(way: Any, version: tuple[int, int], name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        way(version, "sigmab", name)
    assert f"compression[1] ({name})" in str(caught.value)
    assert words in str(caught.value)


def test_input_info_comes_from_the_data_where_the_file_does_not_fit() -> None:
    images = [(torch.zeros(8, 3, 16, 16), torch.zeros(8))]
    points = [((torch.zeros(40, 3), torch.zeros(40, dtype=torch.long)), torch.zeros(4))]
    own = {"input_info": {"sample_size": [1, 3, 32, 32]}}
    assert nncf_file.with_input_info(own, images) is own
    assert nncf_file.with_input_info({}, images)["input_info"] == [{"sample_size": [2, 3, 16, 16]}]
    padded = {"input_info": {"sample_size": [2, 10, 3]}}
    assert nncf_file.with_input_info(padded, points)["input_info"] == [
        {"sample_size": [40, 3]},
        {"sample_size": [40], "type": "long", "filler": "zeros"},
    ]
    assert nncf_file.with_input_info(padded, None) is padded
