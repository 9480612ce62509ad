"""What the sections of a config file need besides the model, asked for before the first of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import CalibrationError
from .nncf_schema import Section

#: Techniques whose needs are known; one of another package may ask for anything.
_KNOWN = ("sigmab", "depth_pruning", "mix_and_match", "legonet")

#: How the functions of this package take what is needed.
ARGUMENTS = {
    "validate": "pass validate=..., a function that takes the network and returns a score on held-out data",
    "train_data": "pass train_data=..., a loader of (inputs, targets)",
    "calibration_data": "pass calibration_data=..., a loader of inputs",
}
#: How NNCF 2.x takes it.
REGISTERED = {
    "validate": "give register_default_init_args(config, train_loader, model_eval_fn=...), a function that takes the "
    "network and returns a score on held-out data",
    **dict.fromkeys(
        ("train_data", "calibration_data"), "call register_default_init_args(config, train_loader)"
    ),
}


def needs(entries: Sequence[Section], *, tree: bool = False) -> Iterator[tuple[Section, str, str]]:
    """(section, ``"validate" | "train_data" | "calibration_data"``, what for), in the order of the list.

    Args:
        tree: the model is a SigmaB net already.
    """
    for entry in entries:
        if entry.technique is None or entry.algorithm not in _KNOWN:
            continue
        values: Any = entry.config
        if entry.algorithm == "sigmab":
            tree = True
        elif entry.algorithm == "mix_and_match":
            yield entry, "validate", "chooses among its runs"
            if values.finetune_epochs:
                yield entry, "train_data", "fine-tunes every run"
        elif entry.algorithm == "depth_pruning" and not values.cut and not tree:
            yield entry, "validate", "names no cut and chooses one"
            yield entry, "train_data", "names no cut and trains a head for each"
        elif entry.algorithm == "legonet":
            if values.finetune_epochs:
                yield entry, "train_data", "fine-tunes its codebook"
            if values.reestimate_batchnorm:
                yield entry, "calibration_data", "re-estimates BatchNorm statistics"


def chooses(entries: Sequence[Section]) -> Section | None:
    """The first section that makes (or, from another package, may make) a choice on held-out data."""
    choosing = {entry.position for entry, need, _ in needs(entries) if need == "validate"}
    for entry in entries:
        if entry.position in choosing or (entry.technique is not None and entry.algorithm not in _KNOWN):
            return entry
    return None


def check_needs(
    entries: Sequence[Section], given: Mapping[str, Any], *, how: Mapping[str, str], tree: bool = False
) -> None:
    """Raise where a section needs what ``given`` holds as None.

    Raises:
        CalibrationError: names the section, what it needs and how it is given.
    """
    for entry, need, purpose in needs(entries, tree=tree):
        if given[need] is None:
            raise CalibrationError(f"{entry} {purpose} and needs {need}: {how[need]}")
