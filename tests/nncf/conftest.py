"""Small real networks and data for the tests with NNCF. Which line of NNCF is installed decides what runs."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SIGMAB = {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "projection_dim": 8}
QUANTIZATION = {
    "algorithm": "quantization",
    "initializer": {
        "range": {"num_init_samples": 64},
        "batchnorm_adaptation": {"num_bn_adaptation_samples": 0},
    },
}
SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "sparsity_init": 0.1,
    "params": {"schedule": "multistep", "multistep_sparsity_levels": [0.3, 0.5], "multistep_steps": [1]},
}
PRUNING = {
    "algorithm": "filter_pruning",
    "pruning_init": 0.1,
    "params": {"pruning_target": 0.4, "pruning_steps": 4},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nncf_major() -> int:
    nncf = pytest.importorskip("nncf", reason="NNCF is not installed")
    nncf.set_log_level(logging.ERROR)
    return int(nncf.__version__.split(".")[0])


@pytest.fixture(scope="session")
def nncf_v2(nncf_major: int) -> Any:
    """``nncf.torch`` of a 2.x that can build compressed models."""
    if nncf_major != 2:
        pytest.skip("create_compressed_model belongs to NNCF 2.x")
    import nncf.torch as nncf_torch
    from nncf.torch.dynamic_graph.patch_pytorch_state import PATCHING_STATE

    if not PATCHING_STATE.operators_are_wrapped:
        pytest.skip("NNCF_TORCH_LEGACY_TRACING=1 is not set: create_compressed_model is switched off")
    return nncf_torch


@pytest.fixture(scope="session")
def nncf_functions(nncf_major: int) -> Any:
    """NNCF whose functions work: 3.x, or 2.x without legacy tracing."""
    import nncf

    if nncf_major == 2 and os.environ.get("NNCF_TORCH_LEGACY_TRACING"):
        pytest.skip("with legacy tracing NNCF's functions do not work in this process")
    return nncf


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """64 images (64, 3, 16, 16) of four classes with a pattern each."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(64) % 4
    patterns = torch.randn(4, 3, 16, 16, generator=generator)
    return patterns[targets] + 0.3 * torch.randn(64, 3, 16, 16, generator=generator), targets


@pytest.fixture
def loader(data: tuple[torch.Tensor, torch.Tensor]) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data), batch_size=16)


@pytest.fixture
def dense(data: tuple[torch.Tensor, torch.Tensor]) -> nn.Module:
    """A ResNet of four small blocks (4 to 32 channels), trained for a moment, in eval mode."""
    return small_resnet(*data)


def small_resnet(images: torch.Tensor, targets: torch.Tensor) -> nn.Module:
    from sigmab_plugin.models import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=4, stem="cifar", width=1 / 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def config_of() -> Any:
    def make(*sections: dict[str, Any], **top: Any) -> dict[str, Any]:
        return {"input_info": {"sample_size": [1, 3, 16, 16]}, "compression": list(sections), **top}

    return make


@pytest.fixture
def sections() -> dict[str, dict[str, Any]]:
    import copy

    return copy.deepcopy(
        {"sigmab": SIGMAB, "quantization": QUANTIZATION, "sparsity": SPARSITY, "pruning": PRUNING}
    )
