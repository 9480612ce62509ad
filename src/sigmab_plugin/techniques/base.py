"""What a compression technique is to the hosts, the command line and ``sigmab compare``.

A technique is plain data around one function. The same object is what an entry point of the groups
``nncf.algorithms`` offers, ours or a third party's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import TechniqueConfig


@dataclass(frozen=True)
class Context:
    """What a technique may need besides the model. A technique that needs a missing part says so.

    Attributes:
        example_inputs: one batch for tracing; a bare tensor is one input, a tuple is splatted.
        calibration_data: re-iterable of inputs or ``(inputs, targets)``.
        train_data: re-iterable of ``(inputs, targets)`` for techniques that fine-tune.
        loss_fn: ``loss_fn(outputs, targets)`` -> scalar; cross-entropy where absent.
        validate: ``validate(model)`` -> score, higher is better, on a *validation* split.
        seed: seed of every random choice.
        options: host objects that only one technique understands.
    """

    example_inputs: Any = None
    calibration_data: Iterable[Any] | None = None
    train_data: Iterable[Any] | None = None
    loss_fn: Callable[[Any, Any], Any] | None = None
    validate: Callable[[nn.Module], float] | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Technique:
    """One algorithm: its name in config files, its section, and how to apply it.

    ``apply(model, config, context)`` returns the compressed module and leaves ``model`` as it was.
    """

    config: type[TechniqueConfig]
    apply: Callable[[nn.Module, Any, Context], nn.Module]

    @property
    def name(self) -> str:
        return self.config.algorithm
