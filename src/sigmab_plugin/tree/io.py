"""Save and load: ``plan.json`` beside ``model.safetensors``, no pickle, safe against a kill.

The plan names the checksum of its weights, and renaming the plan is the one step that counts: until
then the old pair is complete; from then on the new weights are found under their temporary name even
if the process dies before they are renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..channels import slice_module, slices_of
from ..channels.slicing import named_tensors
from ..errors import ConfigError, FormatError, ModelError
from .net import Router, SigmaBNet
from .plan import Plan, module_key, paths_at
from .segments import chain, cut

PLAN = "plan.json"
WEIGHTS = "model.safetensors"
_PENDING = WEIGHTS + ".new"


#: What a net's tensors belong to.
_PARTS = ("backbone", "routers", "specializers", "heads")


def save(net: SigmaBNet, directory: str | os.PathLike[str]) -> Path:
    """Write ``plan.json`` and ``model.safetensors`` into ``directory``; an older pair is replaced atomically.

    Raises:
        OSError: no space or no permission; an older pair stays as it was.
        ModelError: channels were removed after restructuring, so that the plan could not build such a net
            again; a module's extra state is neither a tensor nor JSON; or another framework added tensors.
    """
    from safetensors.torch import save as serialize

    _check_widths(net)
    state = net.state_dict()
    foreign = sorted({name.partition(".")[0] for name in state} - set(_PARTS))
    if foreign:
        raise ModelError(
            f"the net holds tensors of a framework that wrapped it ({', '.join(foreign)}), which no plan describes: "
            "save it as that framework's page tells (docs/nncf.md)"
        )
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    weights = serialize(unshared(tensors), metadata={"format": "pt"})
    facts: dict[str, Any] = {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest()}
    if tied := _tied(net, tensors):
        facts["tied"] = tied
    if len(tensors) < len(state):
        facts["extra_state"] = {
            name: _as_json(name, value) for name, value in state.items() if name not in tensors
        }
    record = {**net.plan.to_dict(), "weights": facts}
    record["sha256"] = _digest(record)
    pending = target / _PENDING
    draft = target / (PLAN + ".new")
    try:
        _write(pending, weights)
        _write(draft, (json.dumps(record, indent=1) + "\n").encode())
    except OSError:
        for path in (pending, draft):
            path.unlink(missing_ok=True)
        raise
    os.replace(draft, target / PLAN)
    os.replace(pending, target / WEIGHTS)
    _sync(target)
    return target


def _tied(net: nn.Module, stored: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of stored tensors that are one tensor in the net; the file holds them once per name."""
    tied: list[list[str]] = []
    for tensors in (net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)):
        names: dict[int, list[str]] = {}
        for name, tensor in tensors:
            if name in stored:
                names.setdefault(id(tensor), []).append(name)
        tied += [group for group in names.values() if len(group) > 1]
    return tied


def _tie(net: nn.Module, names: Sequence[str]) -> None:
    places = [(net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    first = getattr(*places[0])
    for module, key in places[1:]:
        setattr(module, key, first)


def _as_json(name: str, value: Any) -> Any:
    """``value``, if JSON gives it back unchanged."""
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return value
    except (TypeError, ValueError, RecursionError):
        pass
    raise ModelError(
        f"module {name.rpartition('.')[0]!r}: its extra state ({type(value).__name__}) is neither a tensor nor plain "
        "JSON, and nothing is pickled here: let get_extra_state return a tensor, or dicts with string keys, lists, "
        "strings and finite numbers"
    )


def _check_widths(net: SigmaBNet) -> None:
    """The net's tensors have the shapes that its plan gives them."""
    plan = net.plan
    parts: list[tuple[str, nn.Module, int, str]] = [("backbone", net.backbone, 0, "")]
    for depth in range(1, plan.depth + 1):
        for path in paths_at(depth):
            key = module_key(path)
            if plan.shortened is None or depth < plan.depth:
                parts.append((f"specializers.{key}", net.specializers[key], depth, path))
    if plan.shortened is None:
        parts += [
            (f"heads.{module_key(path)}", net.heads[module_key(path)], plan.depth + 1, path)
            for path in plan.leaves
        ]
    for label, module, number, path in parts:
        shapes = plan.tensors[number]
        slices = slices_of(plan.groups, plan.kept(path), segment=number - 1, shapes=shapes) if path else {}
        for name, tensor in named_tensors(module).items():
            if name not in shapes:  # quantizers and masks of hosts
                continue
            expected = list(shapes[name])
            for dim, index in slices.get(name, {}).items():
                expected[dim] = len(index)
            if list(tensor.shape) != expected:
                raise ModelError(
                    f"{label}.{name} has shape {tuple(tensor.shape)}, the plan says {tuple(expected)}: channels were "
                    "removed after restructuring, and the net could not be loaded again. Prune the dense network "
                    "before, or ask for narrower branches with active_ratio or widths"
                )


def unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict for safetensors: contiguous, on the CPU, and no two entries on the same memory.

    Modules that hosts hook into several places appear under several names.

    Raises:
        ModelError: an entry is no tensor (a module's extra state).
    """
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, value in state.items():
        if not torch.is_tensor(value):
            raise ModelError(f"{name!r} is a {type(value).__name__}: only tensors can be stored here")
        tensor = value.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def load(
    directory: str | os.PathLike[str], dense_model: nn.Module | Sequence[nn.Module], *, device: Any = "cpu"
) -> SigmaBNet:
    """Rebuild a saved net; bitwise the weights that were saved.

    Args:
        dense_model: a model of the dense architecture (its weights do not matter; it may be on the
            meta device, unless it has buffers that are not persistent: they come from it), or the
            segments where the net was built from segments.

    Raises:
        FormatError: a file is missing, truncated or altered, or from a newer version; or it lacks a buffer
            that ``dense_model`` has on the meta device.
        ModelError: ``dense_model`` is not the architecture that was restructured; names the tensor.
    """
    from safetensors.torch import load as deserialize

    if isinstance(directory, nn.Module):
        raise ModelError("load takes the folder first: load(directory, dense_model)")
    plan, facts = _read_plan(Path(directory))
    weights = _read_weights(Path(directory), str(facts["sha256"]))
    net = assemble(plan, dense_model)
    try:
        tensors = deserialize(weights)
    except Exception as error:
        raise FormatError(f"{WEIGHTS} is damaged: {error}") from error
    try:
        net.load_state_dict({**tensors, **facts.get("extra_state", {})}, assign=True)
    except RuntimeError as error:
        raise FormatError(f"{WEIGHTS} does not fit {PLAN}: {error}") from error
    for name, buffer in net.named_buffers():
        if buffer.is_meta:
            raise FormatError(
                f"buffer {name!r} is not persistent, so {WEIGHTS} does not hold it, and the dense model has it on the "
                "meta device: give a dense model on a real device, or register the buffer with persistent=True "
                "and save the net again"
            )
    net = net.to(device).eval()
    for names in facts.get("tied", ()):  # after the move, which would untie buffers
        _tie(net, names)
    return net


def read_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan of a saved net, without its weights."""
    return _read_plan(Path(directory))[0]


def assemble(plan: Plan, dense_model: nn.Module | Sequence[nn.Module]) -> SigmaBNet:
    """The net of ``plan`` with slices of ``dense_model``'s weights, fresh routers and fresh auxiliary heads.

    Raises:
        ModelError: the dense model does not match the plan; names the first tensor that differs.
        FormatError: the plan's leaves are shortened at a layer that they do not have.
    """
    if isinstance(dense_model, nn.Module):
        if not plan.config.levels:
            raise ConfigError(
                "this net was built from segments: pass the sequence of segments instead of one model"
            )
        segments = cut(dense_model, levels=plan.config.levels, head=plan.config.head)
    else:
        segments = chain(list(dense_model))
    pieces = (segments.backbone, *segments.tail)
    if len(pieces) != len(plan.tensors):
        raise ModelError(f"the plan has {len(plan.tensors)} segments, the dense model {len(pieces)}")
    for piece, expected in zip(pieces, plan.tensors, strict=True):
        _check_tensors(piece, expected)

    def sliced(number: int, path: str) -> nn.Module:
        slices = slices_of(plan.groups, plan.kept(path), segment=number, shapes=plan.tensors[number + 1])
        return slice_module(
            segments.tail[number], slices, attributes=plan.branches[path].attributes.get(str(number), {})
        )

    config = plan.config
    net = SigmaBNet(
        backbone=slice_module(segments.backbone, {}),
        routers={
            path: Router(
                plan.feature_width(path),
                config.projection_dim,
                dropout=config.projection_dropout,
                temperature=config.router_temperature,
            ).to(segments.reference.dtype)
            for path in plan.inner_nodes
        },
        specializers={
            path: sliced(depth - 1, path) for depth in range(1, plan.depth + 1) for path in paths_at(depth)
        },
        heads={path: sliced(plan.depth, path) for path in plan.leaves},
        plan=plan,
    )
    assert set(net.heads) == {module_key(path) for path in plan.leaves}
    if plan.shortened is not None:
        from ..techniques.depth_pruning.leaves import shorten

        shorten(net, plan.shortened)
    return net


def _check_tensors(piece: nn.Module, expected: dict[str, tuple[int, ...]]) -> None:
    actual = {name: tuple(t.shape) for name, t in named_tensors(piece).items()}
    for name, shape in expected.items():
        if name not in actual:
            raise ModelError(
                f"the dense model has no tensor {name!r}, which the plan expects with shape {shape}"
            )
        if actual[name] != shape:
            raise ModelError(
                f"tensor {name!r} has shape {actual[name]} in the dense model, the plan expects {shape}"
            )
    extra = sorted(set(actual) - set(expected))
    if extra:
        raise ModelError(f"the dense model has a tensor {extra[0]!r} that the plan does not know")


def _read_plan(directory: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what it says of its weights: checksum, tied names, extra states."""
    path = directory / PLAN
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"no {PLAN} in {directory}: not a saved SigmaB net") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is truncated or altered: {error}") from error
    if not isinstance(record, dict):
        raise FormatError(f"{path} is no plan")
    plan = None
    if record.get("sha256") != _digest(record):
        # A plan from the future may be signed otherwise: say that first.
        Plan.from_dict(record)
        raise FormatError(f"{path} was altered: its checksum does not match")
    plan = Plan.from_dict(record)
    return plan, record["weights"]


def _read_weights(directory: Path, checksum: str) -> bytes:
    found = False
    for name in (WEIGHTS, _PENDING):
        with contextlib.suppress(FileNotFoundError):
            data = (directory / name).read_bytes()
            found = True
            if hashlib.sha256(data).hexdigest() == checksum:
                return data
    if not found:
        raise FormatError(f"no {WEIGHTS} in {directory}")
    raise FormatError(f"{directory / WEIGHTS} is truncated or altered: its checksum is not the one in {PLAN}")


def _digest(record: dict[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
