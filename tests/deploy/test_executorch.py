"""ExecuTorch bundles; needs the executorch package, which brings its own list of pins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from sigmab_plugin.deploy import Runner, export, read_manifest

pytest.importorskip("executorch")


@pytest.mark.slow
def test_executorch_agrees_with_torch(
    net: Any, images: Tensor, expected: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    export(net, images[:2], tmp_path / "b", format="executorch")
    budget = 2 * max(read_manifest(tmp_path / "b").path_bytes().values())
    with Runner(tmp_path / "b", budget_bytes=budget) as runner:
        result = runner.run(images)  # more samples than one execution takes
        singles = np.concatenate([runner(image[None]) for image in images[:8]])
    np.testing.assert_allclose(result.logits, expected[0].numpy(), atol=1e-4)
    np.testing.assert_allclose(singles, expected[0][:8].numpy(), atol=1e-4)
    np.testing.assert_array_equal(result.leaves, expected[1].numpy())
