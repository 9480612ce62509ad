"""A folder that the command line writes and reads again.

``plan.json`` and ``model.safetensors`` are the saved net (:func:`sigmab_plugin.save`), without a plan a network that
is no tree (:mod:`sigmab_plugin.hosts.nncf_folder`); ``sigmab.json`` says which
dense model it came from, so that later commands need not be told again; ``twin.safetensors`` is the static twin.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FormatError, ModelError
from ..hosts.nncf_folder import (
    CONFIG_STATE,
    FUNCTIONS_STATE,
    PARTS,
    PLAN,
    WEIGHTS,
    is_depth_pruned,
    is_tree,
    reader_of,
)
from .options import build_model, load_weights, parse_model_args, read_json

if TYPE_CHECKING:
    from torch import nn

    from ..tree import SigmaBNet, StaticTwin

_log = logging.getLogger(__name__)

RECORD = "sigmab.json"
TWIN = "twin.safetensors"
LOG, TWIN_LOG = "log.json", "twin-log.json"
LOGS, TWIN_LOGS = (LOG, "log.csv"), (TWIN_LOG, "twin-log.csv")
#: A record's model outside sigmab_plugin.models that is known to do no more than build a network.
DEMO_MODEL = "sigmab_plugin.cli.demo:demo_network"


@dataclass(frozen=True)
class Record:
    """Where the dense model comes from.

    Attributes:
        model: ``package.module:callable``.
        model_args: its keyword arguments.
        weights: absolute path of the dense weights; None if there were none.
        command: the command that wrote the folder.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    command: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD).write_text(json.dumps({"format": "sigmab-run", **asdict(self)}, indent=1) + "\n")


def record_of(args: argparse.Namespace) -> Record:
    """The record of a command that was given ``--model`` and ``--weights``."""
    weights = None if args.weights is None else str(Path(args.weights).resolve())
    return Record(args.model, parse_model_args(args.model_args), weights, tuple(args.argv))


def read_record(folder: Path, args: argparse.Namespace) -> Record:
    """The folder's record, with what ``--model``, ``--model-args`` and ``--weights`` replace.

    Raises:
        ConfigError: the folder does not exist, nothing says which model it is, or the record alone says that a
            callable that is not this package's is to be called.
    """
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}; give what `sigmab compress --out` wrote")
    record = Record("")
    if (folder / RECORD).is_file():
        content = read_json(folder / RECORD)
        try:
            record = Record(
                content["model"], dict(content["model_args"]), content["weights"], tuple(content["command"])
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{folder / RECORD} is incomplete or was altered: {error}") from error
    if args.model:
        if args.model == record.model and record.model_args and not args.model_args:
            _log.warning(
                "with --model the record's arguments of it are not used; to use them add --model-args %s",
                shlex.quote(json.dumps(record.model_args)),
            )
        record = replace(record, model=args.model, model_args={})
    if args.model_args:
        record = replace(record, model_args=parse_model_args(args.model_args))
    if args.weights:
        record = replace(record, weights=str(Path(args.weights).resolve()))
    if not record.model:
        raise ConfigError(f"{folder} has no {RECORD}: say which dense model it was made from with --model")
    if not (args.model or getattr(args, "trust_record", False) or is_own_model(record.model)):
        raise ConfigError(
            f"{folder / RECORD} names the model {record.model}, code that is not sigmab_plugin's and could do "
            f"anything. If it is yours: {_with_model(args, record)}. If you trust all of the folder: --trust-record"
        )
    return record


def is_own_model(spec: str) -> bool:
    """Whether ``spec`` names a network of this package: one of :mod:`sigmab_plugin.models`, or the demo's.

    Not all that the package can call: some of it calls in turn what its arguments name.
    """
    from .. import models

    module, _, name = spec.rpartition(":")
    own = module in ("", models.__name__) or module.startswith(models.__name__ + ".")
    return spec == DEMO_MODEL or (own and name in models.__all__)


def _with_model(args: argparse.Namespace, record: Record) -> str:
    """The command of ``args`` with the record's model on it, to be typed as it is."""
    words = ["sigmab", *getattr(args, "argv", ()), "--model", record.model]
    if record.model_args and not args.model_args:
        words += ["--model-args", json.dumps(record.model_args)]
    return shlex.join(words)


def open_net(folder: Path, record: Record, device: Any) -> SigmaBNet:
    """The saved net, in eval mode on ``device``; with NNCF's quantizers and masks where ``compress`` has added some.

    Raises:
        ConfigError: NNCF 2.x wrote the folder, or it holds no tree.
        MissingDependencyError: the folder needs NNCF.
    """
    from ..tree import load

    check_tree(folder)
    dense = build_model(record.model, record.model_args)
    if (folder / FUNCTIONS_STATE).is_file():
        from ..hosts import nncf_v3
        from ..hosts.nncf_schema import nncf_version

        nncf_version()
        with redirect_stdout(sys.stderr):  # where NNCF logs
            return nncf_v3.load(folder, dense).to(device)
    return load(folder, dense, device=device)


def check_tree(folder: Path) -> None:
    """Raise where the folder holds a network that is no tree, and say what reads it.

    Raises:
        ConfigError: see above. FormatError: there is no network at all.
    """
    _refuse_config_state(folder)
    if not is_tree(folder):
        raise ConfigError(f"no {PLAN} in {folder}: not a saved SigmaB net but {reader_of(folder)}")


def _refuse_config_state(folder: Path) -> None:
    if (folder / CONFIG_STATE).is_file():
        raise ConfigError(
            f"{folder} was written by NNCF 2.x: read it with create_compressed_model(model, config, "
            f"compression_state=...) and {CONFIG_STATE}, then load {WEIGHTS}"
        )


def open_other(folder: Path, record: Record, example: Any, device: Any) -> nn.Module:
    """A saved network that is no tree, in eval mode on ``device``: shortened, masked, of blocks, or quantized.

    Args:
        example: inputs of one sample, to cut a depth-pruned network's dense model with.

    Raises:
        ConfigError: NNCF 2.x wrote the folder.
        MissingDependencyError: the folder needs NNCF.
        FormatError: the weights are missing or damaged. ModelError: they are another model's.
    """
    _refuse_config_state(folder)
    dense = build_model(record.model, record.model_args)
    if is_depth_pruned(folder):
        from ..techniques.depth_pruning import load_depth_pruned

        return load_depth_pruned(folder / WEIGHTS, dense.to(device), example).eval()
    if (folder / FUNCTIONS_STATE).is_file():
        return _restored(folder, dense).to(device).eval()
    load_weights(dense, folder / WEIGHTS)
    return dense.to(device).eval()


def _restored(folder: Path, dense: nn.Module) -> nn.Module:
    from safetensors.torch import load_file

    from ..hosts.nncf_schema import nncf_version

    nncf_version()
    with redirect_stdout(sys.stderr):  # where NNCF logs
        from ..hosts import nncf_v3

        state, weights = read_json(folder / FUNCTIONS_STATE), load_file(folder / WEIGHTS)
        try:
            return nncf_v3.load_from_config(dense.eval(), state, weights)
        except RuntimeError as error:
            raise ModelError(
                f"{folder / WEIGHTS} does not fit {type(dense).__name__}: {error}. After depth_pruning give "
                "nncf_v3.load_from_config the network that depth_prune makes with the same cut"
            ) from error


def open_dense(record: Record, device: Any) -> nn.Module | None:
    """The dense model with its weights, in eval mode; None where no weights are known."""
    if record.weights is None:
        return None
    return build_model(record.model, record.model_args, record.weights).to(device).eval()


def open_twin(folder: Path, record: Record, net: SigmaBNet, example: Any, device: Any) -> StaticTwin | None:
    """The saved static twin in eval mode; None where there is none.

    Its shape follows from the plan's configuration alone; the weights are those of the file.
    """
    if not (folder / TWIN).is_file():
        return None
    from ..tree import static_twin
    from ..tuning import load_weights

    dense = build_model(record.model, record.model_args).to(device)
    config = net.config.replace(repair="none")  # the file has the repaired weights
    twin = static_twin(dense, example, config=config, calibration_data=[example])
    load_weights(folder / TWIN, twin)
    return twin.to(device).eval()


def save_net(folder: Path, net: SigmaBNet, *, of: Path | None = None, keep: Collection[str] = ()) -> None:
    """Save a tree; files of an earlier network go, but for ``keep``.

    Args:
        of: the folder that the tree was opened from: what NNCF has added to it is saved, too.
    """
    from ..tree import save

    compressed = of is not None and (of / FUNCTIONS_STATE).is_file()
    remove_stale(folder, keep=(PLAN, *keep, *((FUNCTIONS_STATE,) if compressed else ())))
    if not compressed:
        save(net, folder)
        return
    from ..hosts import nncf_v3

    with redirect_stdout(sys.stderr):  # where NNCF logs
        nncf_v3.save(net, folder)


def remove_stale(folder: Path, *, keep: Collection[str]) -> None:
    """Remove what may lie beside the weights of an earlier network; ``keep`` is what the caller writes anew."""
    for name in (*PARTS, TWIN, *LOGS, *TWIN_LOGS):
        if name not in keep:
            (folder / name).unlink(missing_ok=True)


def save_twin(folder: Path, twin: nn.Module) -> Path:
    from ..tuning.checkpoint import save_weights

    save_weights(folder / TWIN, twin, {})
    return folder / TWIN
