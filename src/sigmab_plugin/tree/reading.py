"""Read one example through the pieces of a cut model: what crosses each cut, and whether the pieces are the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ModelError, SigmaBError
from ..modes import evaluating
from ..tuning.seeding import preserve_random_state
from .modality import Modality, Readers, check_features, detect
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
    with evaluating(*([model] if model is not None else []), pieces.backbone, *pieces.tail):
        wanted = None
        if model is not None:
            wanted = _attempt(
                lambda: (pieces.forward_fn or call)(model, example),
                "the model does not run on example_inputs",
            )
            _check_output(wanted)
        frontiers, kinds = _chain(pieces, example)
        output = frontiers.pop()
        _check_output(output)
        if wanted is not None:
            _check_same(wanted, output)
        _check_batch(pieces, [kind.size(value) for kind, value in zip(kinds, frontiers, strict=True)], output)
        longer = _longer(example)
        if longer is not None:  # a dimension that has the batch's length by chance does not grow with it
            more, _ = _chain(pieces, longer)
            output = more.pop()
            _check_batch(pieces, [kind.size(value) for kind, value in zip(kinds, more, strict=True)], output)
        pooled = tuple(kind.pool(value).shape[1] for kind, value in zip(kinds, frontiers, strict=True))
    return Reading(frontiers[0], tuple(kinds), pooled)


def _chain(pieces: Segments, example: Any) -> tuple[list[Any], list[Modality]]:
    """The value at every cut and the output; the modality of every cut."""
    with preserve_random_state():
        torch.manual_seed(0)
        value = _attempt(lambda: pieces.enter(example), "the part before the first level does not run")
        values: list[Any] = []
        kinds: list[Modality] = []
        for number, (name, segment) in enumerate(zip(pieces.names, pieces.tail, strict=True)):
            _check_single(segment, value, name)
            check_features(value, name)
            values.append(value)
            versions = _versions(value)
            with Readers(value, segment.modules()) as readers:
                output = _attempt(
                    lambda segment=segment, value=value: call(segment, value),  # type: ignore[misc]
                    f"the part from {name!r} on does not run on what crosses the cut",
                )
            if number < len(pieces.levels) and _versions(value) != versions:
                raise ModelError(
                    f"level {name!r} changes its input in place, and its sibling branches read the same input: set "
                    "inplace=False where it begins (nn.ReLU(inplace=False)), or write x = x + ... for x += ..."
                )
            before = kinds[-1] if kinds else None
            kinds.append(detect(value, segment.modules(), channels_last=readers.channels_last, before=before))
            value = output
    return [*values, value], kinds


def _attempt(action: Callable[[], Any], what: str) -> Any:
    try:
        return action()
    except SigmaBError:
        raise
    except Exception as error:
        raise ModelError(
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
    return [part._version for part in parts if torch.is_tensor(part)]


def _check_output(output: Any) -> None:
    if torch.is_tensor(output) and output.ndim == 2:
        return
    shown = f"shape {tuple(output.shape)}" if torch.is_tensor(output) else f"a {type(output).__name__}"
    raise ModelError(
        f"the model must return one tensor of logits (B, classes), and returns {shown}: wrap it in a module that does"
    )


def _check_same(wanted: torch.Tensor, found: torch.Tensor) -> None:
    close = wanted.shape == found.shape and torch.allclose(
        wanted.float(),
        found.float(),
        rtol=1e-2,
        atol=1e-2 * float(wanted.float().abs().max()),
        equal_nan=True,
    )
    if not close:
        raise ModelError(
            "backbone, levels and head in a row do not compute what the model computes: hooks on the model itself, and "
            "branches of forward on optional arguments, are lost by cutting. Put them into a submodule, or pass "
            "segments=[backbone, level, ..., head]."
        )


def _check_batch(pieces: Segments, sizes: Sequence[int], output: torch.Tensor) -> None:
    for name, size in zip(pieces.names, sizes, strict=True):
        if size != len(output):
            raise ModelError(
                f"at the cut {name!r} there are {size} rows for {len(output)} samples: what crosses a cut must have "
                "the batch as its first dimension, one row for each sample (batch_first=True; views or frames that "
                "are folded into the batch must be unfolded before the cut)"
            )


def _longer(example: Any) -> Any | None:
    """The example with its first sample once more at the end; None where that cannot be told from tensors alone."""
    parts = example if isinstance(example, (tuple, list)) else [example]
    if isinstance(example, dict):
        parts = list(example.values())
    tensors = [part for part in parts if torch.is_tensor(part)]
    if not tensors or any(t.ndim == 0 or len(t) != len(tensors[0]) for t in tensors):
        return None

    def grown(part: Any) -> Any:
        return torch.cat([part, part[:1]]) if torch.is_tensor(part) else part

    if isinstance(example, dict):
        return {key: grown(part) for key, part in example.items()}
    return tuple(grown(part) for part in example) if isinstance(example, (tuple, list)) else grown(example)
