"""Files of the single-file form: replaced only when asked, and never half of one net with half of another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sigmab_plugin.deploy import export_single_file
from sigmab_plugin.errors import FormatError
from sigmab_plugin.tree.modality import Vectors

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class _Fork(nn.Module):
    """One router, two leaves."""

    leaves = ("0", "1")
    inner_nodes = ("",)

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Linear(16, 16)
        self.routers = nn.ModuleDict({"root": nn.Linear(16, 2)})
        self.specializers = nn.ModuleDict({key: nn.ReLU() for key in self.leaves})
        self.heads = nn.ModuleDict({key: nn.Linear(16, 3) for key in self.leaves})
        self.modality = Vectors()
        self.modalities = (Vectors(), Vectors())


@pytest.mark.slow
def test_an_interrupted_export_keeps_graph_and_weights_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))

    def logits() -> Any:
        session = ort.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
        return session.run(None, {"input": x[:1].numpy()})[0]

    file = export_single_file(_Fork(0).eval(), x, tmp_path / "net.onnx")
    first, written = logits(), {p.name for p in tmp_path.iterdir()}
    with pytest.raises(FormatError, match=r"net\.onnx exists: pass overwrite=True"):
        export_single_file(_Fork(1).eval(), x, file)
    replace = os.replace

    def cut_off(source: Path, target: Path) -> None:
        if Path(target) == file:
            raise OSError("power failed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(OSError, match="power failed"):
        export_single_file(_Fork(1).eval(), x, file, overwrite=True)
    np.testing.assert_array_equal(logits(), first)
    monkeypatch.undo()
    export_single_file(_Fork(1).eval(), x, file, overwrite=True)
    assert np.abs(logits() - first).max() > 1e-3
    names = {p.name for p in tmp_path.iterdir()}
    assert len(names) == 2
    assert names & written == {"net.onnx"}
