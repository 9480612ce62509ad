"""Reference networks. Names load lazily, so importing the package does not need torch-geometric."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "BasicBlock": "resnet",
    "Bottleneck": "resnet",
    "ResNet": "resnet",
    "cifar_resnet18": "resnet",
    "cifar_resnet50": "resnet",
    "imagenet_resnet50": "resnet",
    "PointNet2": "pointnet2",
    "convert_ssg_state_dict": "pointnet2",
    "DSCNN": "ds_cnn",
    "load_mlperf_ds_cnn": "ds_cnn",
    "MobileNetV1": "mobilenet_v1",
    "load_mlperf_mobilenet_v1": "mobilenet_v1",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
