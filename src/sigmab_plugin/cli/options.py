"""Options that several subcommands share, and what they mean. Torch is imported where it is used."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FormatError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from ..data import Dataset

_log = logging.getLogger(__name__)

#: Share of the training split that choices are made on, where no other split is named.
VALIDATION_FRACTION = 0.1


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every subcommand that computes has."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="seed of all random choices (default 0)"
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1 …; auto (default) is cuda where there is one",
    )
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    add_output_options(parser, group)


def add_output_options(parser: argparse.ArgumentParser, group: Any = None) -> None:
    """How to talk: for machines, quietly, with tracebacks."""
    group = group or parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout instead of tables"
    )
    group.add_argument("--quiet", "-q", action="store_true", help="no progress bars, warnings only")
    group.add_argument("--debug", action="store_true", help="show tracebacks and debug messages")


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """``--model``, ``--model-args``, ``--weights``."""
    group = parser.add_argument_group("dense model")
    group.add_argument(
        "--model",
        required=required,
        metavar="PACKAGE.MODULE:CALLABLE",
        help="what returns the dense model; a bare name is one of sigmab_plugin.models, such as cifar_resnet50",
    )
    group.add_argument(
        "--model-args", default=None, metavar="JSON", help="keyword arguments of that call, as JSON"
    )
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="the dense model's weights: .safetensors, .pth or .pt (read without unpickling code)",
    )


def add_data_options(parser: argparse.ArgumentParser, *, required: bool, split: str) -> None:
    """``--data`` with its split and batch size."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=required,
        metavar="PATH",
        help="folder or zip in ImageFolder layout, .npz, HDF5, or 'digits' (scikit-learn's)",
    )
    group.add_argument(
        "--split",
        metavar="NAME",
        help=f"split of the data (default {split}; all samples where the data have no splits)",
    )
    parser.set_defaults(default_split=split)
    group.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="samples per batch (default 64)"
    )
    group.add_argument("--image-size", type=positive, metavar="N", help="resize and crop images to N x N")


def add_folder_options(parser: argparse.ArgumentParser, *, data_required: bool, split: str) -> None:
    """The folder of a saved network, data to run it on, what replaces its record of the dense model, how to run."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="what compress or finetune wrote")
    add_data_options(parser, required=data_required, split=split)
    add_model_options(parser, required=False)
    parser.add_argument(
        "--trust-record",
        action="store_true",
        help="call whatever the folder's record names as its model, which may be code of anyone's",
    )
    add_run_options(parser)


def load_model(args: argparse.Namespace) -> nn.Module:
    """The dense model of ``--model`` with ``--weights``; without these, one line says what is worked on."""
    if args.weights is None:
        _log.warning(
            "no --weights: what is compressed are the weights that %s returns, random unless it loads some itself",
            args.model,
        )
    return build_model(args.model, parse_model_args(args.model_args), args.weights)


def parse_model_args(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--model-args is not JSON ({error}); write for example '{{\"num_classes\": 10}}'"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError("--model-args must be a JSON object of keyword arguments")
    return values


#: ``module:attribute`` or ``attribute``, both with dots between names.
_SPEC = re.compile(r"(?:[^\W\d]\w*(?:\.[^\W\d]\w*)*:)?[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def build_model(
    spec: str, arguments: Mapping[str, Any], weights: str | os.PathLike[str] | None = None
) -> nn.Module:
    """Call ``package.module:callable(**arguments)`` and load ``weights``.

    Raises:
        ConfigError: nothing there under that name, or the call refuses its arguments.
        ModelError: the result is no ``nn.Module``, or the weights do not fit.
    """
    from torch import nn

    factory = _resolve(spec)
    try:
        model = factory(**arguments)
    except TypeError as error:
        raise ConfigError(f"{spec} does not take these arguments: {error}; see --model-args") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        load_weights(model, weights)
    return model


def _resolve(spec: str) -> Any:
    if not _SPEC.fullmatch(spec):
        raise ConfigError(
            f"--model {spec!r}: write package.module:callable, for example mymodels:make_net, or a bare name of "
            "sigmab_plugin.models"
        )
    module_name, separator, attribute = spec.partition(":")
    if not separator:
        module_name, attribute = "sigmab_plugin.models", spec
    # A console script does not have the working directory on its path; a user's own module lives there.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        named_file = module_name.endswith(".py")
        hint = f"; write {module_name.removesuffix('.py')}:{attribute}" if named_file else ""
        raise ConfigError(f"--model {spec}: cannot import {module_name} ({error}){hint}") from error
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            known = [name for name in getattr(target, "__all__", ()) if not name.startswith("_")]
            near = difflib.get_close_matches(part, dir(target), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}" if known else ""
            if not separator and "." in spec:
                hint = f"; for a module of your own write {':'.join(spec.rsplit('.', 1))}"
            raise ConfigError(f"--model {spec}: {module_name} has no {attribute!r}{hint}") from error
    if not callable(target):
        raise ConfigError(f"--model {spec}: {attribute} is not callable; name a class or a function")
    return target


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state dict into ``model``; nothing is unpickled that could run code.

    A dict nested under ``state_dict``, ``model_state_dict`` or ``model``, and the prefix ``module.`` of data-parallel
    training, are undone.

    Raises:
        FormatError: the file cannot be read as weights.
        ModelError: tensors are missing, unexpected or of another shape; some are named.
    """
    state = _read_state(Path(path))
    own = model.state_dict()
    if not set(state) & set(own):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    # Checkpoints from before torch 0.4.1 do not count BatchNorm's batches; torch leaves the count at 0, too.
    missing = [key for key in own if key not in state and key.split(".")[-1] != "num_batches_tracked"]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = []
    for names, word in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{len(names)} {word}: {', '.join(names[:3])}{more}")
    if problems:
        raise ModelError(f"{path} does not fit {type(model).__name__}; {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no such weights file: {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise FormatError(f"{path} is truncated or no safetensors file ({error})") from error
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise FormatError(
            f"{path} cannot be read as plain weights; save a state dict (model.state_dict()), best as .safetensors"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(hasattr(value, "shape") for value in state.values()):
        found = f"; it has the keys {', '.join(map(str, list(state)[:8]))}" if isinstance(state, dict) else ""
        raise FormatError(f"{path} holds no state dict{found}; save model.state_dict()")
    return state


def open_data(args: argparse.Namespace) -> Dataset:
    """The data set of ``--data``, of it :func:`split_of`."""
    return open_split(args.data, split_of(args), image_size=args.image_size)


def split_of(args: argparse.Namespace) -> str | None:
    """``--split``, else the command's default; None where none was asked for and the data have none."""
    if args.split is not None:
        return str(args.split)
    return str(args.default_split) if has_splits(args.data) else None


def has_splits(source: str) -> bool:
    """Whether ``source``, a path or ``digits``, is divided into named splits."""
    from ..data import splits_of

    return source == "digits" or bool(splits_of(source))


def open_split(source: str, split: str | None, *, image_size: int | None) -> Dataset:
    """A split of ``source``, a path or ``digits``; None: all of a source without splits.

    Raises:
        ConfigError: the source has no such split, or no samples in it.
    """
    from .. import data

    if source == "digits":
        return data.digits(split)
    dataset = data.open_dataset(source, split=split, image_size=image_size)
    if not len(dataset):
        raise ConfigError(
            f"{source} has no samples{f' in split {split!r}' if split else ''}; give other data"
        )
    return dataset


def seed_of(args: argparse.Namespace) -> int:
    """``--seed``, 0 where it was not given."""
    return args.seed or 0


def pick_device(args: argparse.Namespace, given: Any = None) -> Any:
    """Torch device ``given``, else that of ``--device``; also sets ``--threads`` and the seed.

    Raises:
        ConfigError: no such device here.
    """
    import torch

    from ..tuning.settings import usable

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(seed_of(args))
    if given is not None:
        return given
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return usable(name)


@contextmanager
def working_device(args: argparse.Namespace) -> Iterator[Any]:
    """Device of this process: its own under ``torchrun``, otherwise :func:`pick_device`'s.

    Raises:
        ConfigError: no such device here, or under ``torchrun`` one of another type than the process's own.
    """
    from ..tuning.distributed import is_distributed, process_group

    with process_group() as own:
        if is_distributed() and args.device.partition(":")[0] not in ("auto", own.type):
            raise ConfigError(
                f"--device {args.device}: under torchrun each process has a device of its own, here {own}; leave "
                "--device out"
            )
        yield pick_device(args, own) if is_distributed() else pick_device(args)


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file; what is wrong with it is one line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no such file: {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error


def read_sections(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], Any]:
    """Compression sections of a config file, and its ``input_info`` (None where absent).

    The file is NNCF-style, ``{"input_info": …, "compression": {…} or […]}``, or one bare section with "algorithm".

    Raises:
        ConfigError: neither, or a section without its algorithm.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConfigError(
            f'{path}: expected a JSON object with "compression", or one section with "algorithm"'
        )
    if "algorithm" in content:
        sections: Any = [content]
    else:
        sections = content.get("compression")
        sections = [sections] if isinstance(sections, dict) else sections
    if not isinstance(sections, list) or not sections:
        raise ConfigError(
            f'{path}: "compression" is missing or empty; give one section or a list of sections'
        )
    for section in sections:
        if not isinstance(section, dict) or not isinstance(section.get("algorithm"), str):
            raise ConfigError(f'{path}: each compression section needs "algorithm", for example "sigmab"')
    return [dict(section) for section in sections], content.get("input_info")


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {value}")
    return value
