"""Read one example through the pieces of a cut model: what crosses each cut, and whether the pieces are the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ModelError, SigmaBError
from ..modes import evaluating
from ..tuning.seeding import preserve_random_state
from .agreement import agree
from .detection import Witnesses, detect
from .modality import Modality, Points, check_features
from .segments import Segments, call


@dataclass(frozen=True)
class Reading:
    """What one example showed.

    Attributes:
        frontier: the backbone's output.
        modalities: the kind of data at each cut. features: pooled channels there.
    """

    frontier: Any
    modalities: tuple[Modality, ...]
    features: tuple[int, ...]


def read_example(
    pieces: Segments,
    example: Any,
    *,
    model: nn.Module | None = None,
) -> Reading:
    """Run the example through backbone, levels and head.

    Args:
        model: what the pieces were cut from; they must compute the same.

    Raises:
        ModelError: the model or a piece does not run; a value at a cut has no features or no batch dimension; a level
            changes its input; the output is no tensor (B, classes); the pieces do not compute what the model does.
    """
    if any(tensor.is_meta for module in (pieces.backbone, *pieces.tail) for tensor in module.parameters()):
        raise ModelError("the model is on the meta device and has no values: load its weights first")
    try:
        return _read(pieces, example, model)
    except _RunError as error:
        raise ModelError(str(error)) from error.__cause__


def _read(pieces: Segments, example: Any, model: nn.Module | None) -> Reading:
    with evaluating(*([model] if model is not None else []), pieces.backbone, *pieces.tail):
        whole = functools.partial(_whole, pieces, model, example)
        wanted = whole() if model is not None else None
        frontiers, kinds, output = _chain(pieces, example)
        _check_output(output)
        if wanted is not None:
            _check_same(output, wanted, whole)
        _check_batch(pieces, frontiers, kinds, output)
        if not any(isinstance(kind, Points) for kind in kinds):  # their rows are points, not samples
            _check_longer(pieces, example)
        pooled = tuple(kind.pool(value).shape[1] for kind, value in zip(kinds, frontiers, strict=True))
    return Reading(frontiers[0], tuple(kinds), pooled)


class _RunError(ModelError):
    """A piece does not run on what it is given."""


def _chain(pieces: Segments, example: Any) -> tuple[list[Any], list[Modality], Any]:
    """The value and the modality at every cut, and the output."""
    with _seeded():
        with Witnesses(pieces.backbone) as before:
            value = _attempt(lambda: pieces.enter(example), "the part before the first level does not run")
        values: list[Any] = []
        kinds: list[Modality] = []
        for number, (name, segment) in enumerate(zip(pieces.names, pieces.tail, strict=True)):
            _check_single(segment, value, name)
            check_features(value, name)
            values.append(value)
            versions = _versions(value)
            with Witnesses(segment) as behind:
                output = _attempt(
                    functools.partial(call, segment, value),
                    f"the part from {name!r} on does not run on what crosses the cut",
                )
            if number < len(pieces.levels) and _versions(value) != versions:
                raise ModelError(
                    f"level {name!r} changes its input in place, and its sibling branches read the same input: set "
                    "inplace=False where it begins (nn.ReLU(inplace=False)), or write x = x + ... for x += ..."
                )
            previous = kinds[-1] if kinds else None
            modules = segment.modules()
            kinds.append(
                detect(value, before=before, behind=behind, previous=previous, modules=modules, cut=name)
            )
            value, before = output, behind
    return values, kinds, value


def _whole(pieces: Segments, model: Any, example: Any) -> torch.Tensor:
    """The output of the model as it is."""
    run = pieces.forward_fn or call
    with _seeded():
        output: torch.Tensor = _attempt(
            lambda: run(model, example), "the model does not run on example_inputs"
        )
    _check_output(output)
    return output


@contextmanager
def _seeded() -> Iterator[None]:
    """A sampling's first point, or noise that is drawn in eval mode, too, is the same in every run."""
    with preserve_random_state():
        torch.manual_seed(0)
        yield


def _attempt(action: Callable[[], Any], what: str) -> Any:
    try:
        return action()
    except SigmaBError:
        raise
    except Exception as error:
        raise _RunError(
            f"{what}: {type(error).__name__}: {error}. Give example_inputs (shape, dtype, device) as the model takes "
            "them; arguments that are optional in forward must be given or have no effect."
        ) from error


def _check_single(segment: nn.Module, value: Any, name: str) -> None:
    """A list that one module hands to the next is one value there, and would be several here."""
    if not isinstance(segment, fx.GraphModule) or not isinstance(value, (tuple, list)):
        return
    if sum(node.op == "placeholder" for node in segment.graph.nodes) == 1:
        raise ModelError(
            f"what crosses the cut at {name!r} is one {type(value).__name__} of {len(value)} values: cut where a "
            "tensor is passed on, or have forward pass the values as arguments of their own"
        )


def _versions(value: Any) -> list[int]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    # Tensors made in inference mode have no version.
    return [part._version for part in parts if torch.is_tensor(part) and not part.is_inference()]


def _check_output(output: Any) -> None:
    if torch.is_tensor(output) and output.ndim == 2:
        return
    shown = f"shape {tuple(output.shape)}" if torch.is_tensor(output) else f"a {type(output).__name__}"
    raise ModelError(
        f"the model must return one tensor of logits (B, classes), and returns {shown}: wrap it in a module that does"
    )


def _check_same(found: torch.Tensor, wanted: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
    if agree(found, wanted, tolerance=1e-2):
        return
    if not agree(again(), wanted, tolerance=1e-2):
        raise ModelError(
            "the model gives other outputs for the same inputs when it is called again: a layer changes its state in "
            "eval mode, or draws random numbers that no seed of torch's governs"
        )
    raise ModelError(
        "backbone, levels and head in a row do not compute what the model computes: hooks on the model itself, and "
        "branches of forward on optional arguments, are lost by cutting. Put them into a submodule, or pass "
        "segments=[backbone, level, ..., head]."
    )


def _check_batch(
    pieces: Segments, frontiers: Sequence[Any], kinds: Sequence[Modality], output: torch.Tensor
) -> None:
    for name, value, kind in zip(pieces.names, frontiers, kinds, strict=True):
        size = kind.size(value)
        if size != len(output):
            raise ModelError(
                f"at the cut {name!r} there are {size} rows for {len(output)} samples: what crosses a cut must have "
                "the batch as its first dimension, one row for each sample (batch_first=True; views or frames that "
                "are folded into the batch must be unfolded before the cut)"
            )


def _check_longer(pieces: Segments, example: Any) -> None:
    """A dimension that has the batch's length by chance does not grow with it."""
    longer = _longer(example)
    if longer is None:
        return
    try:
        frontiers, kinds, output = _chain(pieces, longer)
    except _RunError:  # not every first dimension of the inputs is the batch
        return
    _check_batch(pieces, frontiers, kinds, output)


def _longer(example: Any) -> Any | None:
    """The example with its first sample once more at the end; None where that cannot be told from tensors alone."""
    if isinstance(example, dict):
        grown = _longer(list(example.values()))
        return None if grown is None else dict(zip(example, grown, strict=True))
    parts = example if isinstance(example, (tuple, list)) else [example]
    tensors = [part for part in parts if torch.is_tensor(part)]
    if not tensors or any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors):
        return None
    longer = tuple(torch.cat([part, part[:1]]) if torch.is_tensor(part) else part for part in parts)
    return longer if isinstance(example, (tuple, list)) else longer[0]
