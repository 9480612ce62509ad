"""Accuracy benchmark on real data: dense network, SigmaB, static twin, Torch-Pruning, ablations.

    python benchmarks/run.py modelnet40 --data FOLDER --out runs/modelnet40 --stage all --seed 0 --seed 1
    python benchmarks/run.py cifar100 --data FOLDER --out runs/cifar100 --stage dense --max-seconds 540

Every stage resumes where a killed one stopped. Results are one JSON file per arm and seed under --results;
what is there already is not run again. ``benchmarks/report.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from accuracy.experiments import open_experiment  # noqa: E402
from accuracy.runs import Session, arm_stage, dense_stage  # noqa: E402

STAGES = ("dense", "sigmab", "twin", "arms", "all")


def main(argv: list[str] | None = None) -> int:
    """Run the stages asked for; 0 when all are finished, 3 when time ran out before."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    recipe_file = Path(arguments.recipe or HERE / "recipes" / f"{arguments.experiment}-{arguments.size}.json")
    recipe = json.loads(recipe_file.read_text())
    command = ["python", "benchmarks/run.py", *(_public(argv if argv is not None else sys.argv[1:]))]
    session = Session(
        name=recipe_file.stem,
        recipe=recipe,
        experiment=open_experiment(recipe, arguments.data, Path(arguments.cache)),
        out=Path(arguments.out),
        results=Path(arguments.results),
        command=command,
        device=arguments.device,
        max_seconds=arguments.max_seconds,
    )
    print(f"{recipe_file.stem}: {shlex.join(command)}", flush=True)
    arms = arguments.arm or list(recipe["arms"])
    if arguments.stage in ("sigmab", "twin"):
        arms = [arguments.stage]
    for seed in arguments.seed or [0]:
        dense_seed = seed if arguments.dense_seed is None else arguments.dense_seed
        if arguments.stage in ("dense", "all") and not dense_stage(session, dense_seed):
            return 3
        if arguments.stage == "dense":
            continue
        for arm in arms:
            if not arm_stage(session, arm, seed=seed, dense_seed=dense_seed):
                return 3
    return 0


def _public(arguments: list[str]) -> list[str]:
    """The command for the record, without the folders of this machine."""
    kept, hide = [], False
    for word in arguments:
        kept.append(Path(word).name if hide else word)
        hide = word in ("--data", "--out", "--results", "--cache", "--recipe")
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("modelnet40", "cifar100", "keywords", "digits"))
    parser.add_argument(
        "--data", action="append", default=[], help="folder or file; may be repeated; digits needs none"
    )
    parser.add_argument("--out", required=True, help="folder of checkpoints")
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the result files")
    parser.add_argument("--cache", default=str(HERE / "cache"), help="folder of decoded data")
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; default 0")
    parser.add_argument(
        "--dense-seed", type=int, help="make all arms from this dense network; default: the seed's own"
    )
    parser.add_argument("--stage", choices=STAGES, default="all")
    parser.add_argument("--arm", action="append", help="only these arms of the recipe; may be repeated")
    parser.add_argument("--size", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--recipe", help="a recipe file instead of the one for the experiment and size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--max-seconds", type=float, help="stop after the epoch that leaves too little time; run again"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
