"""``sigmab compress --config`` for files that list more than the tree: carried out by NNCF, whichever is installed."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .options import VALIDATION_FRACTION, load_model, open_data, read_sections, seed_of

if TYPE_CHECKING:
    from ..data import Dataset
    from ..hosts.nncf_file import Way
    from ..hosts.nncf_schema import Section
    from ..hosts.nncf_v3 import SectionReport

#: Options that change one field of the file's sigmab section.
FIELDS = ("levels", "head", "active_ratio", "projection_dim", "repair")


def lists_more_than_the_tree(args: argparse.Namespace) -> bool:
    """Whether ``--config`` names a file with another algorithm than sigmab."""
    if not args.config:
        return False
    sections, _ = read_sections(args.config)
    return any(section["algorithm"] != "sigmab" for section in sections)


def carry_out(args: argparse.Namespace, device: Any) -> None:
    """Carry the file out, print what each section did, and save the network to ``--out``.

    Raises:
        ConfigError: an option that these files have no use for, or a file that the installed NNCF cannot carry out.
        MissingDependencyError: a section needs NNCF.
    """
    from ..data import Loader
    from ..hosts.nncf_file import compress_from_file, way_of
    from ..hosts.nncf_folder import PARTS
    from ..hosts.nncf_needs import chooses
    from ..hosts.nncf_schema import check
    from ..tuning.distributed import is_distributed
    from .calibration import Labelled
    from .folder import record_of, remove_stale
    from .measure import accuracy_on, check_fit, example_of, say, shows_progress

    if args.preset:
        raise ConfigError("give --config or --preset, not both")
    if args.twin:
        raise ConfigError(
            f"--twin stands beside a tree alone, and {args.config} lists more: run its sigmab section by itself, or "
            "`sigmab compare`"
        )
    if is_distributed():
        raise ConfigError(
            f"{args.config} lists more than a tree, which NNCF does in one process: leave torchrun out"
        )
    content = merged(args)
    entries = check(content)
    way = way_of(entries)
    model = load_model(args).to(device)
    data = open_data(args)
    check_fit(model, example_of(data, device), len(data.classes), args.data)
    choosing = chooses(entries)
    held_out = None
    if choosing is not None:
        data, held_out = hold_out(args, data, choosing)
    results = sys.stdout
    if not args.json:
        print(way, file=results, flush=True)

    def on_section(report: SectionReport) -> None:
        if not args.json:
            print(report, file=results, flush=True)

    batches = Labelled(data, args, device)
    say(args, f"carrying out {args.config} over {batches.samples:,} samples")
    if held_out is not None:
        say(args, f"{len(held_out):,} samples are held out: {choosing} chooses on them")
    with contextlib.redirect_stdout(sys.stderr):  # where NNCF logs and draws its bars
        if way.kind != "techniques" and not shows_progress(args):
            quieten_nncf(way)
        result = compress_from_file(
            content,
            model,
            calibration_data=batches,
            train_data=batches,
            validate=None if held_out is None else accuracy_on(Loader(held_out, batch_size=args.batch_size)),
            on_section=on_section,
            seed=seed_of(args),
        )
        remove_stale(args.out, keep=PARTS)  # these are save's own business
        saved = result.save(args.out)
    record_of(args).write(args.out)
    if args.json:
        record = {
            "path": way.name,
            "reason": way.reason,
            "samples": batches.samples,
            "sections": [
                {"section": report.section, "text": report.text, "facts": report.facts}
                for report in result.reports
            ],
            "validation_samples": 0 if held_out is None else len(held_out),
            "files": {"network": str(args.out), **{file.kind: str(file.path) for file in saved}},
            "read_by": {file.kind: file.read_by for file in saved},
        }
        print(json.dumps(record, indent=1), file=results)
    else:
        print(f"\nnetwork  {args.out}", file=results)
        for file in saved:
            size = f"{file.path.stat().st_size:,} bytes"
            print(f"{file.kind.ljust(7)}  {file.path} ({size}), read by {file.read_by}", file=results)


def hold_out(args: argparse.Namespace, data: Dataset, choosing: Section) -> tuple[Dataset, Dataset]:
    """(what is compressed on, the share that ``choosing`` chooses on), the same share for the same ``--seed``.

    Raises:
        ConfigError: the data have too few labelled samples to hold any out.
    """
    from ..data import split_validation

    try:
        return split_validation(data, fraction=VALIDATION_FRACTION, seed=seed_of(args))
    except ConfigError as error:
        raise ConfigError(
            f"{choosing} chooses on held-out samples, and none can be held out of {args.data}: {error}. Give --data "
            "with two labelled samples of every class at least"
        ) from error


def quieten_nncf(way: Way) -> None:
    if way.kind == "config file":
        from ..hosts.nncf_file import require_legacy_tracing
        from ..hosts.nncf_schema import nncf_version

        require_legacy_tracing(nncf_version())  # decides how nncf is imported
    import nncf

    nncf.set_log_level(logging.ERROR)


def merged(args: argparse.Namespace) -> dict[str, Any]:
    """The file's content, with the options of :data:`FIELDS` and ``--seed`` in its sigmab section.

    Raises:
        ConfigError: an option of the tree, and no section to put it into.
    """
    from ..config import SigmaBConfig
    from ..hosts.nncf_schema import read

    sections, _ = read_sections(args.config)
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    trees = [section for section in sections if section["algorithm"] == SigmaBConfig.algorithm]
    if given and not trees:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{options}: {args.config} has no sigmab section to change")
    if args.seed is not None:
        given["seed"] = args.seed
    for section in trees:
        section.update(given)
    content = read(args.config)
    top = {} if "algorithm" in content else {key: content[key] for key in content if key != "compression"}
    return {**top, "compression": sections}
