"""What a runner takes as inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sigmab_plugin.deploy.frontier import as_arrays
from sigmab_plugin.deploy.manifest import Value
from sigmab_plugin.errors import ConfigError

ONE = (Value("input", "float32", (None, 4)),)
TWO = (Value("input_0", "float32", (None, 4)), Value("input_1", "float32", (None, 4)))


def test_bytes_are_in_the_machines_order() -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    for order in "<>":
        (array,) = as_arrays(x.astype(f"{order}f4"), ONE, modality="vectors")
        assert array.dtype.isnative
        assert array.tobytes() == x.tobytes()


def test_inputs_have_one_batch_size() -> None:
    with pytest.raises(ConfigError, match="one batch size; got 1, 4"):
        as_arrays((torch.zeros(4, 4), torch.zeros(1, 4)), TWO, modality="vectors")
    ragged = as_arrays((torch.zeros(4, 4), torch.zeros(1, 4)), TWO, modality="points")
    assert [len(array) for array in ragged] == [4, 1]


def test_points_are_sorted_by_sample() -> None:
    points = (Value("pos", "float32", (None, 3)), Value("batch", "int64", (None,)))
    for numbers, sorted_ in (([0, 0, 1], True), ([1, 0, 0], False)):
        inputs = (torch.zeros(3, 3), torch.tensor(numbers))
        if sorted_:
            assert len(as_arrays(inputs, points, modality="points")) == 2
        else:
            with pytest.raises(ConfigError, match="sorted by sample"):
                as_arrays(inputs, points, modality="points")


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2, 4).bfloat16(), torch.zeros(2, 4).to_sparse(), [[1.0, 2.0], [3.0]]],
    ids=["bfloat16", "sparse", "ragged"],
)
def test_what_numpy_cannot_hold(value: Any) -> None:
    with pytest.raises(ConfigError, match="input 0 must be float32; NumPy cannot hold"):
        as_arrays((value,), ONE, modality="vectors")
