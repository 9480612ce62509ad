"""The packed model: one codebook, an index per block, and everything that stays dense."""

from __future__ import annotations

import copy
import fnmatch
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import ConfigError, FormatError, ModelError
from .bits import bits_per_index, pack_bits, unpack_bits
from .blocks import block_grid, from_blocks, to_blocks
from .config import LegoNetConfig
from .kmeans import kmeans

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedTensor:
    """One weight tensor as indices into the codebook.

    Attributes:
        shape: shape of the weight.
        dtype: its dtype's name, e.g. ``"float32"``.
        index: uint8, the bit-packed indices of its blocks, row by row of the block grid.
        scale: float32, ``(1,)`` per layer or ``(rows,)`` per row; None where the codebook is used as it is.
    """

    shape: tuple[int, ...]
    dtype: str
    index: Tensor
    scale: Tensor | None = None

    def indices(self, block_size: int, codebook_size: int) -> Tensor:
        """``(blocks,)`` int64."""
        down, across = block_grid(self.shape, block_size)
        return unpack_bits(self.index, down * across, bits_per_index(codebook_size))

    def expand(self, codebook: Tensor, block_size: int) -> Tensor:
        """The weight: every block replaced by its codebook entry, times the scale."""
        index = self.indices(block_size, codebook.shape[0])
        if index.numel() and int(index.max()) >= codebook.shape[0]:
            raise FormatError("an index lies past the end of the codebook; the file is altered")
        return assemble(codebook[index], self.shape, block_size, self.scale).to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class PackedModel:
    """A whole model, packed. :meth:`expand` gives a state dict, :func:`expand_into` a module.

    Attributes:
        config: the options it was packed with.
        codebook: ``(K, b*b)`` float32.
        tensors: packed weights by parameter name.
        dense: everything else of the state dict.
        aliases: further names of tied tensors -> the name they are stored under.
    """

    config: LegoNetConfig
    codebook: Tensor
    tensors: Mapping[str, PackedTensor]
    dense: Mapping[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def expand(self) -> dict[str, Tensor]:
        """State dict with every packed weight rebuilt from the codebook."""
        state = dict(self.dense)
        for name, packed in self.tensors.items():
            state[name] = packed.expand(self.codebook, self.config.block_size)
        state.update({alias: state[name] for alias, name in self.aliases.items()})
        return state

    def with_dense(self, net: nn.Module) -> PackedModel:
        """The same packed weights with what is stored dense taken from ``net``, e.g. BatchNorm statistics."""
        state = net.state_dict()
        return replace(self, dense={name: state[name].detach().cpu().clone() for name in self.dense})


def assemble(blocks: Tensor, shape: tuple[int, ...], block_size: int, scale: Tensor | None) -> Tensor:
    """Blocks ``(n, b*b)`` -> weight of ``shape``, times ``scale``; differentiable in both."""
    weight = from_blocks(blocks, shape, block_size)
    return weight if scale is None else weight * scale.reshape(-1, *[1] * (len(shape) - 1))


def pack(model: nn.Module, config: LegoNetConfig | None = None) -> PackedModel:
    """Pack every weight tensor of ``model`` (two dimensions or more) with one codebook.

    One-dimensional parameters (biases, normalisation), buffers and ``config.ignored_layers`` stay
    dense. ``model`` is only read.

    Raises:
        ModelError: nothing to pack, or parameters that are not materialised.
        ConfigError: an ignored pattern that matches nothing.
    """
    config = config or LegoNetConfig()
    stored, aliases = _state(model)
    names = _packable(model, stored, aliases, config)
    scales = {name: _root_mean_square(stored[name], config.scale) for name in names}
    blocks = torch.cat([scaled_blocks(stored[name], scales[name], config.block_size) for name in names])
    if config.codebook_size > len(blocks):
        logger.info(
            "legonet: codebook_size %d is more than the %d blocks there are; each block is its own entry",
            config.codebook_size, len(blocks),
        )  # fmt: skip
        config = config.replace(codebook_size=len(blocks))
    clusters = kmeans(
        blocks,
        config.codebook_size,
        iterations=config.iterations,
        tolerance=config.tolerance,
        sample=config.sample,
        full_passes=config.full_passes,
        seed=config.seed,
    )
    logger.info(
        "legonet: %d blocks of %d tensors, K = %d, distortion %.4g",
        len(blocks), len(names), config.codebook_size, clusters.distortion,
    )  # fmt: skip
    del blocks
    bits = bits_per_index(config.codebook_size)
    tensors, start = {}, 0
    for name in names:
        weight = stored[name]
        down, across = block_grid(weight.shape, config.block_size)
        index = clusters.index[start : start + down * across]
        start += down * across
        tensors[name] = PackedTensor(
            shape=tuple(weight.shape),
            dtype=str(weight.dtype).removeprefix("torch."),
            index=pack_bits(index, bits),
            scale=_fitted_scale(weight, clusters.centroids[index], scales[name], config.block_size),
        )
    dense = {n: t.detach().clone().cpu() for n, t in stored.items() if n not in tensors}
    return PackedModel(config, clusters.centroids, tensors, dense, aliases)


def expand_into(packed: PackedModel, model: nn.Module) -> nn.Module:
    """A copy of ``model`` that holds the expanded weights.

    Raises:
        FormatError: names or shapes of ``packed`` are not those of ``model``.
    """
    result = copy.deepcopy(model)
    try:
        result.load_state_dict(packed.expand())
    except RuntimeError as error:
        raise FormatError(
            f"the packed weights do not fit this {type(model).__name__}; build it with the options it was "
            f"packed with. {error}"
        ) from error
    return result


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict without repetitions, and the other names of tied tensors."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ModelError(f"state dict entry {name!r} is not a tensor; pack a submodule without it")
        if is_lazy(value):
            raise ModelError(f"parameter {name!r} has no shape yet; run the model once, then pack it")
        if value.is_meta:
            raise ModelError(
                f"{name!r} is on the meta device, without values; load the weights, then pack them"
            )
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            stored[name] = value
    return stored, aliases


def _packable(
    model: nn.Module, stored: Mapping[str, Tensor], aliases: Mapping[str, str], config: LegoNetConfig
) -> list[str]:
    parameters = {name for name, _ in model.named_parameters()}
    weights = (name for name in stored if name in parameters)
    names = [
        n for n in weights if stored[n].ndim >= 2 and stored[n].is_floating_point() and stored[n].numel()
    ]
    known = {**{name: name for name in names}, **aliases}
    ignored: set[str] = set()
    for pattern in config.ignored_layers:
        matched = {
            name
            for spelled, name in known.items()
            if name in names and any(fnmatch.fnmatchcase(part, pattern) for part in _prefixes(spelled))
        }
        if not matched:
            raise ConfigError(f"legonet: ignored_layers: {pattern!r} matches no weight of the model")
        ignored |= matched
    names = [name for name in names if name not in ignored]
    if not names:
        raise ModelError(f"{type(model).__name__} has no weight tensor of two dimensions or more to pack")
    return names


def _prefixes(name: str) -> Iterator[str]:
    """``"a.b.weight"`` -> itself and the names of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _root_mean_square(weight: Tensor, kind: str) -> Tensor | None:
    """Positive divisor per layer ``(1,)`` or per row ``(rows,)``; 1 where all weights are 0."""
    if kind == "none":
        return None
    matrix = weight.detach().cpu().to(torch.float32).reshape(weight.shape[0], -1)
    mean_square = matrix.square().mean(1) if kind == "row" else matrix.square().mean().reshape(1)
    return torch.where(mean_square > 0, mean_square.sqrt(), 1.0)


def scaled_blocks(weight: Tensor, scale: Tensor | None, block_size: int) -> Tensor:
    """``(blocks, b*b)`` float32 on the CPU: what is clustered, ``weight`` divided by ``scale``."""
    weight = weight.detach().cpu().to(torch.float32)
    if scale is not None:
        weight = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
    return to_blocks(weight, block_size)


def _fitted_scale(weight: Tensor, blocks: Tensor, scale: Tensor | None, block_size: int) -> Tensor | None:
    """Least-squares scale for the blocks that were chosen: <w, c> / <c, c>, per layer or per row."""
    if scale is None:
        return None
    matrix = weight.detach().cpu().to(torch.float32).reshape(weight.shape[0], -1)
    chosen = from_blocks(blocks, matrix.shape, block_size)
    product, square = (matrix * chosen).sum(1), chosen.square().sum(1)
    if len(scale) == 1:
        product, square = product.sum().reshape(1), square.sum().reshape(1)
    return torch.where(square > 0, product / square.clamp(min=torch.finfo(torch.float32).tiny), scale)
