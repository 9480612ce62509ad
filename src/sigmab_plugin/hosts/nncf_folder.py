"""The folder of a network that a config file has compressed: what is written into it, and what reads it again."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..techniques.legonet import PackedModel

_log = logging.getLogger(__name__)

PLAN, WEIGHTS = "plan.json", "model.safetensors"
#: What NNCF's functions, and NNCF 2.x's config path, leave beside the weights.
FUNCTIONS_STATE, CONFIG_STATE = "nncf.json", "compression_state.json"
#: LegoNet's indices and codebook; Mix-and-Match's table of runs.
PACKED, RUNS = "legonet.safetensors", "mix_and_match.json"
#: Where layers or channels were removed, plain weights do not say which.
_IF_WHOLE = (
    ", if no section removed layers or channels; else load them into what the same sections make of it"
)
#: Beside the weights; where another network is saved, what it does not write itself is stale.
PARTS = (PLAN, FUNCTIONS_STATE, CONFIG_STATE, PACKED, RUNS)


@dataclass(frozen=True)
class SavedFile:
    """A file in the folder: ``kind`` is ``weights``, ``packed`` or ``runs``; ``read_by`` is for people."""

    kind: str
    path: Path
    read_by: str


def write(
    network: nn.Module, directory: Path, *, plain: bool, controller: Any = None
) -> tuple[SavedFile, ...]:
    """Write ``network``; files of these names that belonged to another network are removed.

    Args:
        plain: NNCF has added nothing to the network that is still there.
        controller: NNCF 2.x's, where there is one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        (directory / name).unlink(missing_ok=True)
    written = []
    # fx.GraphModule's deepcopy leaves these behind, so they are read before any copy is made.
    packed, runs = getattr(network, "legonet", None), getattr(network, "mix_and_match", None)
    if plain:
        network = network if controller is None else _without_nncf(network)
        written.append(SavedFile("weights", directory / WEIGHTS, _write_plain(network, directory)))
    elif controller is not None:
        written.append(
            SavedFile("weights", directory / WEIGHTS, _write_config_state(network, directory, controller))
        )
    else:
        written.append(SavedFile("weights", directory / WEIGHTS, _write_functions_state(network, directory)))
    if plain and packed is not None and _write_packed(packed, network, directory / PACKED):
        reader = "sigmab_plugin.techniques.legonet.load_packed(file, model)"
        written.append(SavedFile("packed", directory / PACKED, reader))
    if runs is not None:
        (directory / RUNS).write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        written.append(SavedFile("runs", directory / RUNS, "json.load: every run, ranked"))
    return tuple(written)


def _without_nncf(network: nn.Module) -> nn.Module:
    """A copy with its own classes, where nothing but NNCF 2.x's wrapper is left of NNCF."""
    import copy

    from .nncf_v2_network import unwrap

    return unwrap(copy.deepcopy(network)).eval()


def _write_plain(network: nn.Module, directory: Path) -> str:
    from ..techniques.depth_pruning import DepthPrunedNet, save_depth_pruned
    from ..tree.io import save
    from ..tree.net import SigmaBNet

    if isinstance(network, SigmaBNet):
        save(network, directory)
        return "sigmab_plugin.load(folder, dense)"
    if isinstance(network, DepthPrunedNet):
        try:
            save_depth_pruned(network, directory / WEIGHTS)
        except ModelError as error:  # found once all sections have run, so the weights are kept all the same
            _log.warning("%s. What is written are the weights alone.", error)
        else:
            return (
                "sigmab_plugin.techniques.depth_pruning.load_depth_pruned(file, dense, example_inputs); "
                f"cut after {network.cut}"
            )
    _write_weights(network, directory)
    return f"dense.load_state_dict(safetensors.torch.load_file(file)){_IF_WHOLE}"


def _write_config_state(network: nn.Module, directory: Path, controller: Any) -> str:
    _write_weights(network, directory)
    state = json.dumps(controller.get_compression_state(), indent=1, default=_as_json)
    (directory / CONFIG_STATE).write_text(state + "\n", encoding="utf-8")
    return f"create_compressed_model(dense, config, compression_state=...) with {CONFIG_STATE}, then load_state_dict"


def _write_functions_state(network: nn.Module, directory: Path) -> str:
    from ..tree.io import save
    from ..tree.net import SigmaBNet
    from .nncf_v3 import get_config

    module = "sigmab_plugin.hosts.nncf_v3"
    if isinstance(network, SigmaBNet):
        save(network, directory)
        reader = f"{module}.load(folder, dense)"
    else:
        _write_weights(network, directory)
        reader = f"{module}.load_from_config(model, json.load({FUNCTIONS_STATE}), load_file(file))"
    try:
        text = json.dumps(get_config(network), indent=1)
    except ModelError as error:
        _log.warning("no %s in %s: %s", FUNCTIONS_STATE, directory, error)
        return "nothing: NNCF has no config for weight_compression"
    (directory / FUNCTIONS_STATE).write_text(text + "\n", encoding="utf-8")
    return reader


def _write_weights(network: nn.Module, directory: Path) -> None:
    from safetensors.torch import save_file

    from ..tree.io import unshared

    save_file(unshared(network.state_dict()), directory / WEIGHTS, metadata={"format": "pt"})


def _as_json(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} in a compression state cannot be written as JSON")


def _write_packed(packed: PackedModel, network: nn.Module, path: Path) -> bool:
    """Write LegoNet's packed form, if the weights of ``network`` are still those of the codebook."""
    from ..techniques.legonet import save_packed

    state: dict[str, torch.Tensor] = network.state_dict()
    expanded = packed.expand()
    changed = [name for name in packed.tensors if not _equal(state.get(name), expanded[name])]
    if changed:
        _log.warning(
            "no %s: %d of %d weights are no longer those of the codebook (%s); train the codebook itself, with "
            "legonet's finetune_epochs",
            path.name, len(changed), len(packed.tensors), changed[0],
        )  # fmt: skip
        return False
    save_packed(packed.with_dense(network), path)
    return True


def _equal(own: torch.Tensor | None, stored: torch.Tensor) -> bool:
    return own is not None and own.shape == stored.shape and bool((own.detach().cpu() == stored).all())


# ---------------------------------------------------------------- reading


def is_tree(directory: Path) -> bool:
    """Whether a SigmaB net is saved there, that its plan describes."""
    return (directory / PLAN).is_file()


def is_depth_pruned(directory: Path) -> bool:
    """Whether the weights there are those of a depth-pruned network, cut included.

    Raises:
        FormatError: the weights are missing, truncated or altered, or those of a tree without its plan.
    """
    from safetensors import SafetensorError, safe_open

    from ..techniques.depth_pruning.network import FORMAT

    path = directory / WEIGHTS
    if not path.is_file():
        raise FormatError(f"no {PLAN} in {directory} and no {WEIGHTS}: no saved network")
    try:
        with safe_open(path, framework="pt") as file:
            if any(name.startswith("routers.") for name in file.keys()):  # noqa: SIM118 - the file is no mapping
                raise FormatError(f"no {PLAN} in {directory}: these are weights of a tree, without its plan")
            return (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError as error:
        raise FormatError(f"{path} is truncated or altered: {error}") from error


def reader_of(directory: Path) -> str:
    """What reads a folder of a network that is no tree, for people.

    Raises:
        FormatError: there is no readable network in the folder.
    """
    if is_depth_pruned(directory):
        found = "a depth-pruned network: sigmab_plugin.techniques.depth_pruning.load_depth_pruned"
        return f"{found}('{directory / WEIGHTS}', dense, example_inputs) reads it"
    if (directory / FUNCTIONS_STATE).is_file():
        found = (
            "a network that NNCF's functions have compressed: sigmab_plugin.hosts.nncf_v3.load_from_config"
        )
        return f"{found} reads it, with {FUNCTIONS_STATE} and {WEIGHTS}"
    if (directory / PACKED).is_file():
        return (
            "a network of LegoNet blocks: sigmab_plugin.techniques.legonet.load_packed"
            f"('{directory / PACKED}', dense) reads it"
        )
    return f"plain weights: dense.load_state_dict(load_file('{directory / WEIGHTS}')) reads them{_IF_WHOLE}"
