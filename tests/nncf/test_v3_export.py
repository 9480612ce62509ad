"""Quantized networks as bundles: OpenVINO and ONNX Runtime give what torch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tree", "dense"])
def test_bundles_run(
    nncf_functions: Any,
    dense: nn.Module,
    config_of: Any,
    sections: Any,
    loader: Any,
    data: Any,
    tmp_path: Path,
    kind: str,
) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    from sigmab_plugin.deploy import Runner
    from sigmab_plugin.hosts import nncf_v3
    from sigmab_plugin.hosts.nncf_v3_export import export

    images, _ = data
    dataset = nncf_functions.Dataset(loader, lambda batch: batch[0])
    chosen = [sections["sigmab"], sections["quantization"]] if kind == "tree" else [sections["quantization"]]
    net = nncf_v3.compress(dense, config_of(*chosen), dataset)
    with torch.no_grad():
        expected = net(images)
    for form in ("openvino", "onnx"):
        manifest = export(net, images[:2], tmp_path / form, format=form)
        stored = sum(node.weights.nbytes for node in manifest.nodes)
        parameters = sum(p.numel() for n, p in net.named_parameters() if "nncf_hooks" not in n)
        assert stored < 2.5 * parameters, "weights are stored as bytes"
        with Runner(tmp_path / form) as runner:
            output = torch.from_numpy(runner(images.numpy()))
        agreement = (output.argmax(1) == expected.argmax(1)).float().mean()
        assert float(agreement) >= 0.95, form
