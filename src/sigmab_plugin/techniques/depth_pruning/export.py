"""int8 export to ONNX, statically quantized with calibration data."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...counting import as_arguments
from ...errors import CalibrationError, MissingDependencyError


@dataclass(frozen=True)
class Int8Export:
    """What was written.

    Attributes:
        path: the quantized model.
        file_bytes: size of that file.
        float_file_bytes: size of the same network exported in float32.
        int8_values: weights stored in one byte each.
        agreement: share of the calibration samples whose argmax the two files share.
    """

    path: Path
    file_bytes: int
    float_file_bytes: int
    int8_values: int
    agreement: float


def export_int8(
    model: nn.Module, path: str | Path, *, calibration_data: Iterable[Any], per_channel: bool = True
) -> Int8Export:
    """Quantize weights and activations to int8 and write an ONNX file (QDQ form).

    Args:
        model: a network of one or more tensor inputs and one tensor output; left as it was.
        calibration_data: batches of inputs or ``(inputs, targets)``; the first one is also the example.
        per_channel: one weight scale per output channel.

    Raises:
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
        CalibrationError: no calibration batch.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise MissingDependencyError(
            f"int8 export needs {error.name}: pip install 'sigmab-plugin[deploy]'"
        ) from error

    batches = [_inputs_only(batch) for batch in calibration_data]
    if not batches:
        raise CalibrationError(
            "int8 export: calibration_data gave no batch; pass a few batches of real inputs"
        )
    names = [f"input_{index}" for index in range(len(batches[0]))]
    feeds = [
        {name: argument.detach().cpu().numpy() for name, argument in zip(names, batch, strict=True)}
        for batch in batches
    ]

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.remaining: Iterator[dict[str, np.ndarray]] = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.remaining, None)

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        plain, prepared = Path(scratch) / "float.onnx", Path(scratch) / "prepared.onnx"
        _export_float(model, plain, batches[0], names)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
        )
        float_bytes = _strip(onnx, prepared)
        file_bytes = _strip(onnx, target)
        agreement = _agreement(onnxruntime, prepared, target, feeds)
    graph = onnx.load(str(target)).graph
    int8_values = sum(
        int(np.prod(tensor.dims)) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8
    )
    return Int8Export(target, file_bytes, float_bytes, int8_values, agreement)


class _Positional(nn.Module):
    """Gives every network the same signature, on which the form of ``dynamic_shapes`` depends."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.network(*inputs)


def _inputs_only(batch: Any) -> tuple[torch.Tensor, ...]:
    """A list or tuple batch is ``(inputs, targets)``; anything else is the inputs."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch
    return tuple(as_arguments(inputs))


def _export_float(model: nn.Module, path: Path, example: tuple[torch.Tensor, ...], names: list[str]) -> None:
    runnable = _Positional(copy.deepcopy(model).cpu()).eval()
    example = tuple(argument.cpu() for argument in example)
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} if argument.dim() else None for argument in example)
    if len(example[0]) == 1:  # a batch of one would be taken for a constant
        example = tuple(argument.repeat(2, *[1] * (argument.dim() - 1)) for argument in example)
    torch.onnx.export(
        runnable,
        example,
        str(path),
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=(shapes,),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _strip(onnx: Any, path: Path) -> int:
    """Drop what no runtime reads (source locations, inferred shapes); the size of the file in bytes."""
    model = onnx.load(str(path))
    del model.graph.value_info[:], model.metadata_props[:], model.graph.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    onnx.save(model, str(path))
    return path.stat().st_size


def _agreement(onnxruntime: Any, first: Path, second: Path, feeds: list[dict[str, np.ndarray]]) -> float:
    sessions = [
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for file in (first, second)
    ]
    equal, samples = 0, 0
    for feed in feeds:
        one, other = (session.run(None, feed)[0].argmax(-1) for session in sessions)
        equal += int((one == other).sum())
        samples += one.size
    return equal / samples
