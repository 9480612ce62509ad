"""Networks that NNCF's functions have compressed: strip for deployment, describe, save and load."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, ModelError
from ..tree.net import SigmaBNet
from .nncf_v3_parts import Part, as_inputs, change_parts, is_wrapped, wrap_parts, wrapped_parts


def strip(network: nn.Module, example_inputs: Any, *, do_copy: bool = True) -> nn.Module:
    """``nncf.strip`` for every part: quantizers become torch's own, masks are multiplied into the weights.

    Args:
        example_inputs: one batch of the network's inputs.
    """
    import nncf

    result = copy.deepcopy(network) if do_copy else network

    def strip_part(part: Part) -> nn.Module:
        if not is_wrapped(part.module):
            return part.module
        fold_masks(part.module)
        stripped: nn.Module = nncf.strip(part.module, do_copy=False, example_input=part.example)
        return stripped

    return change_parts(result, [as_inputs(example_inputs)], strip_part, per_leaf=False)[0]


def fold_masks(module: nn.Module) -> None:
    """Multiply the masks of ``nncf.prune`` into the weights, in place, and remove their hooks.

    ``nncf.strip`` in its native format, which has the quantizers to convert, leaves them as hooks. Masks of integers
    (``weight_compression`` after ``magnitude_sparsity``) stay: the decompressor reads what they give.
    """
    import nncf

    if not hasattr(nncf, "prune"):
        return
    from nncf.torch.function_hook.hook_storage import decode_hook_name
    from nncf.torch.function_hook.pruning.magnitude.modules import UnstructuredPruningMask
    from nncf.torch.function_hook.pruning.rb.modules import RBPruningMask
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.model_graph_manager import split_const_name

    storage = get_hook_storage(module)
    for name, hook in list(storage.named_hooks()):
        if not isinstance(hook, (UnstructuredPruningMask, RBPruningMask)):
            continue
        _, tensor_name, _ = decode_hook_name(name)
        owner, attribute = split_const_name(tensor_name.replace(":", "."))
        weight = getattr(module.get_submodule(owner), attribute)
        if not weight.is_floating_point():
            continue
        hook.eval()
        with torch.no_grad():
            weight.data = hook(weight.detach())
        storage.delete_hook(name)


def get_config(network: nn.Module) -> dict[str, Any]:
    """What NNCF has added to ``network``, as JSON types; :func:`load_from_config` adds it again.

    For a network that is no SigmaB net this holds ``nncf.torch.get_config``'s result under the part ``""``.

    Raises:
        ModelError: NNCF has no config for what it has added (``compress_weights``).
    """
    import nncf.torch

    described = {}
    for name, module in wrapped_parts(network):
        if is_wrapped(module):
            try:
                described[name] = nncf.torch.get_config(module)
            except nncf.InternalError as error:
                raise ModelError(
                    f"NNCF cannot describe what it has added to {name or 'the network'!r}: {error} After "
                    "weight_compression keep the network before it, and compress again."
                ) from error
    return {"format": "sigmab-nncf", "version": 1, "parts": described}


def load_from_config(
    network: nn.Module, config: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> nn.Module:
    """Add to ``network``, in place, what :func:`get_config` found in another of the same structure.

    Args:
        network: the network before quantization, for example ``sigmab_plugin.load(directory, dense)``.
        state: the compressed network's ``state_dict``; loaded bit for bit, data types included.
    """
    import nncf.torch

    if config.get("format") != "sigmab-nncf":
        raise FormatError(f"not a config written by get_config: format is {config.get('format')!r}")
    if config.get("version") != 1:
        raise FormatError(f"config version {config.get('version')}: this package reads version 1; upgrade it")
    result = wrap_parts(network, copy_network=False)
    known = dict(wrapped_parts(result))
    for name, entry in config["parts"].items():
        if name not in known:
            raise FormatError(
                f"the config holds a part {name!r} that the network does not have: another model?"
            )
        nncf.torch.load_from_config(known[name], entry)
    if state is not None:
        result.load_state_dict(state, assign=True)
    return result


def save(network: SigmaBNet, directory: str | Path) -> Path:
    """Plan, NNCF config and weights of a compressed SigmaB net, side by side; no pickle."""
    from ..tree.io import save as save_net

    target = save_net(network, directory)
    (target / "nncf.json").write_text(json.dumps(get_config(network), indent=1) + "\n", encoding="utf-8")
    return target


def load(directory: str | Path, dense_model: nn.Module) -> SigmaBNet:
    """Read what :func:`save` wrote, bit for bit."""
    from safetensors.torch import load_file

    from ..tree.io import assemble, read_plan

    target = Path(directory)
    config = json.loads((target / "nncf.json").read_text(encoding="utf-8"))
    network = assemble(read_plan(target), dense_model)
    restored = load_from_config(network, config, load_file(target / "model.safetensors"))
    assert isinstance(restored, SigmaBNet)
    return restored.eval()
