"""The ``sigmab`` command.

Parsers are built from :data:`COMMANDS` without torch; a subcommand imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import SigmaBError

#: Subcommands, in the order of the help. Each module of this package has ``add_parser(subparsers)``, which
#: returns the parser, and ``run(args)``, which returns an exit code or None. Modules import torch inside ``run``.
COMMANDS = (
    "demo",
    "compress",
    "finetune",
    "evaluate",
    "compare",
    "inspect",
    "export",
)

#: Exit codes: what the user can mend, and an interrupt from the keyboard.
EXIT_ERROR = 2
EXIT_INTERRUPT = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sigmab",
        description="Turn a pretrained network into a SigmaB tree that runs one path per input.",
        epilog="sigmab COMMAND --help shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"sigmab-plugin {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        module = import_module(f".{name}", __name__)
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    A :class:`SigmaBError` and an unusable file are one line on stderr and exit code 2; ``--debug`` shows where.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words, argparse.Namespace(argv=words))
    debug = getattr(args, "debug", False)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING if getattr(args, "quiet", False) else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s" if debug else "%(message)s",
        stream=sys.stderr,
    )
    try:
        code = args.run(args)
    except BrokenPipeError:
        # The reader of a pipe is gone (`sigmab inspect … | head`): nobody is left to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (SigmaBError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        if getattr(args, "json", False):
            print(json.dumps({"error": type(error).__name__, "message": message}))
        print(f"sigmab: error: {message}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("sigmab: interrupted", file=sys.stderr)
        return EXIT_INTERRUPT
    return int(code or 0)
