"""ExecuTorch artefacts: one program per node, lowered to XNNPACK; its weights are part of the program.

So the region holds the whole ``.pte``, and the program beside it says only how to call it.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch

from ..bundle import Artefact, Options
from ..nodes import NodeSource
from ..onnx_graph import export_failure, require

LIBRARIES = ("executorch",)

#: Memory is planned for this many samples; larger batches are run in parts.
MAX_BATCH = 8


def export_artefact(source: NodeSource, options: Options) -> Artefact:
    exir = require("executorch.exir", "executorch")
    partitioner = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    example = tuple(t[:MAX_BATCH] for t in source.example)
    program = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.export.export(
                source.module, example, dynamic_shapes=(tuple({0: batch} for _ in example),)
            )
            lowered = exir.to_edge_transform_and_lower(
                program, partitioner=[partitioner.XnnpackPartitioner()]
            )
            data = bytes(lowered.to_executorch().buffer)
    except Exception as error:  # the stages raise many kinds; all of them mean the same to the caller
        raise export_failure(source, "ExecuTorch", error, traced=program is not None) from error
    program_bytes = json.dumps({"method": "forward", "max_batch": MAX_BATCH}).encode()
    return Artefact(program_bytes, ".json", [("pte", "uint8", (len(data),), data)])


def requires(options: Options) -> dict[str, Any]:
    """A program runs on any machine with the XNNPACK delegate."""
    return {}
