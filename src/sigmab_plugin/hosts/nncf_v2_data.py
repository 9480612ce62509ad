"""What NNCF 2.x already knows (registered loaders, criterion, input info) as a technique's :class:`Context`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from nncf.config import NNCFConfig
from nncf.config.structures import BNAdaptationInitArgs, ModelEvaluationArgs, QuantizationRangeInitArgs
from nncf.torch.initialization import PTInitializingDataLoader, wrap_dataloader_for_init
from nncf.torch.nncf_network import NNCFNetwork
from nncf.torch.structures import QuantizationPrecisionInitArgs
from torch import nn

from ..errors import CalibrationError
from ..techniques.base import Context


class LoaderBatches:
    """Batches of an NNCF initializing loader as ``(inputs, targets)``; can be iterated again."""

    def __init__(self, loader: Any, device: torch.device | str) -> None:
        self._loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        for item in self._loader:
            args, kwargs = self._loader.get_inputs(item)
            if kwargs:
                raise CalibrationError(
                    f"the registered loader passes keyword arguments ({', '.join(kwargs)}); pass the model's inputs by "
                    "position in PTInitializingDataLoader.get_inputs"
                )
            moved = tuple(move(value, self._device) for value in args)
            inputs = moved[0] if len(moved) == 1 else moved
            yield inputs, move(self._loader.get_target(item), self._device)

    def __len__(self) -> int:
        return len(self._loader)


def move(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if hasattr(value, "to") else value


def calibration_batches(config: NNCFConfig, device: torch.device | str) -> LoaderBatches | None:
    """The loader that ``register_default_init_args`` or ``register_extra_structs`` attached; None without one."""
    for kind in (QuantizationRangeInitArgs, BNAdaptationInitArgs, QuantizationPrecisionInitArgs):
        if config.has_extra_struct(kind):
            struct: Any = config.get_extra_struct(kind)
            return LoaderBatches(wrap_dataloader_for_init(struct.data_loader), struct.device or device)
    return None


def extra_structs(
    calibration_data: Iterable[Any] | None,
    *,
    train_data: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    validate: Callable[[nn.Module], float] | None = None,
) -> list[Any]:
    """What :func:`context_of` finds again, as structures for ``NNCFConfig.register_extra_structs``."""
    found: list[Any] = []
    if calibration_data is not None:
        loader = BatchLoader(calibration_data)
        found += [QuantizationRangeInitArgs(loader), BNAdaptationInitArgs(loader)]
    if train_data is not None and (loss_fn is not None or train_data is not calibration_data):

        def loss(outputs: Any, targets: Any, criterion: Any) -> Any:
            return criterion(outputs, targets)

        found.append(QuantizationPrecisionInitArgs(loss, loss_fn, BatchLoader(train_data)))  # type: ignore[arg-type]
    if validate is not None:
        found.append(ModelEvaluationArgs(eval_fn=validate))
    return found


def training_batches(config: NNCFConfig, device: torch.device | str) -> LoaderBatches | None:
    """The loader that was registered with a criterion, else the one that statistics are taken from."""
    if config.has_extra_struct(QuantizationPrecisionInitArgs):
        struct: Any = config.get_extra_struct(QuantizationPrecisionInitArgs)
        return LoaderBatches(wrap_dataloader_for_init(struct.data_loader), struct.device or device)
    return calibration_batches(config, device)


def registered(config: NNCFConfig) -> dict[str, Any]:
    """The parts of a :class:`Context` that :func:`context_of` will find; None for those that are missing."""
    loader = calibration_batches(config, "cpu")
    return {"calibration_data": loader, "train_data": loader, "validate": _validate(config)}


def context_of(config: NNCFConfig, network: NNCFNetwork) -> Context:
    """Everything registered with ``config`` that a technique can use."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    batches = calibration_batches(config, device)
    args, kwargs = network.nncf._input_info.get_forward_inputs(device)
    if kwargs:
        raise CalibrationError(
            f"input_info gives keyword arguments ({', '.join(kwargs)}); leave 'keyword' out and order them by position"
        )
    return Context(
        example_inputs=tuple(args),
        calibration_data=batches,
        train_data=training_batches(config, device),
        loss_fn=_loss_fn(config),
        validate=_validate(config),
    )


def _loss_fn(config: NNCFConfig) -> Callable[[Any, Any], Any] | None:
    if not config.has_extra_struct(QuantizationPrecisionInitArgs):
        return None
    struct: Any = config.get_extra_struct(QuantizationPrecisionInitArgs)
    if struct.criterion is None:
        return None
    return lambda outputs, targets: struct.criterion_fn(outputs, targets, struct.criterion)


def _validate(config: NNCFConfig) -> Callable[[nn.Module], float] | None:
    if not config.has_extra_struct(ModelEvaluationArgs):
        return None
    struct: Any = config.get_extra_struct(ModelEvaluationArgs)
    return lambda model: float(struct.eval_fn(model))


class BatchLoader(PTInitializingDataLoader):
    """Any re-iterable of ``(inputs, targets)`` as NNCF's initializing loader; inputs are a tensor or a tuple."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        _, targets = next(iter(batches))  # not the inputs: rows of a point cloud are no samples
        self._size = len(targets) if isinstance(targets, Sized) else 1
        super().__init__(batches)

    @property
    def batch_size(self) -> int:
        return self._size

    def __len__(self) -> int:
        return len(self._batches) if isinstance(self._batches, Sized) else sum(1 for _ in self._batches)

    def get_inputs(self, dataloader_output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = dataloader_output[0]
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}

    def get_target(self, dataloader_output: Any) -> Any:
        return dataloader_output[1]
