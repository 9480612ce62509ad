"""Masks as NNCF's own pruning hooks (``nncf.prune``'s form, NNCF 3.x and 2.19), for export and strip by NNCF."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import MissingDependencyError, ModelError


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` whose weights pass through ``masks`` (True = kept) by parameter name.

    The hooks are those that ``nncf.prune`` inserts, so ``nncf.strip`` and NNCF's exporters know them.

    Raises:
        MissingDependencyError: no NNCF with function hooks.
        ModelError: a name or shape that the model does not have.
    """
    try:
        from nncf.torch.function_hook.pruning.magnitude.modules import UnstructuredPruningMask
        from nncf.torch.function_hook.wrapper import register_post_function_hook, wrap_model
    except ImportError as error:
        raise MissingDependencyError(
            'masks as hooks need NNCF 2.19 or 3.x: pip install "sigmab-plugin[nncf]"'
        ) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ModelError(
                f"no weight {name!r} of shape {tuple(mask.shape)}; the masks are another model's"
            )
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapped: nn.Module = wrap_model(copy.deepcopy(model))
    for alias, mask in masks.items():
        name = canonical[id(parameters[alias])]  # NNCF knows a tied weight by its first name alone
        hook = UnstructuredPruningMask(tuple(mask.shape)).to(parameters[name].device)
        hook.binary_mask.copy_(mask)
        # NNCF calls a constant by its parameter's name; its output has port 0.
        register_post_function_hook(wrapped, op_name=name, port_id=0, hook=hook)
    return wrapped
