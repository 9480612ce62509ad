"""A device that runs bundles needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sigmab_plugin.deploy import export_chain

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_the_runner_is_imported_without_torch(run_python: Callable[..., Any], bundle: Path) -> None:
    done = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "from sigmab_plugin.deploy import Runner, read_manifest\n"
        "import sigmab_plugin.deploy.backends.onnxruntime, sigmab_plugin.deploy.onnx_graph\n"
        f"print(len(read_manifest({str(bundle)!r}).nodes))"
    )
    assert done.stdout.split() == ["7"]


@pytest.mark.slow
def test_an_onnx_bundle_runs_without_torch(run_python: Callable[..., Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    export_chain([model], torch.zeros(2, 4), tmp_path / "b", precision="fp16")
    done = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from sigmab_plugin.deploy import Runner\n"
        f"with Runner({str(tmp_path / 'b')!r}, threads=1) as runner:\n"
        "    print(*runner(np.ones((1, 4), np.float32))[0])"
    )
    with torch.no_grad():
        wanted = model(torch.ones(1, 4)).numpy()[0]
    np.testing.assert_allclose(np.array(done.stdout.split(), np.float32), wanted, atol=1e-3)
