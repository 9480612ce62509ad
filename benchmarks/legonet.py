"""LegoNet as published, measured: speed of the clustering, real bytes, weight error, accuracy.

    python benchmarks/legonet.py speed --threads 2         # ResNet-50's blocks against scikit-learn
    python benchmarks/legonet.py accuracy                  # a network trained here on scikit-learn's digits
    python benchmarks/legonet.py accuracy --experiment keywords --data FOLDER --weights dense.safetensors

``accuracy`` takes the experiments of ``benchmarks/run.py`` (digits, keywords, cifar100); without ``--weights`` it
trains the recipe's dense network first. No choice is made on the test part: every row that is computed is printed.
Results are written to ``benchmarks/results/legonet-<name>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from accuracy.experiments import Experiment, open_experiment  # noqa: E402
from sigmab_plugin import finetune  # noqa: E402
from sigmab_plugin.models import imagenet_resnet50  # noqa: E402
from sigmab_plugin.techniques.base import Context  # noqa: E402
from sigmab_plugin.techniques.legonet import (  # noqa: E402
    LegoNetConfig,
    PackedModel,
    compress,
    expand_into,
    finetune_codebook,
    measure,
    pack,
)
from sigmab_plugin.techniques.legonet.blocks import to_blocks  # noqa: E402
from sigmab_plugin.techniques.legonet.kmeans import kmeans  # noqa: E402
from sigmab_plugin.tuning import TrainRecipe, evaluate  # noqa: E402

#: What arXiv 2603.06606 states: compression ratio; accuracy unchanged, without data or retraining.
CLAIMED = {16: 128, 32: 64}
ACCURACIES = ("accuracy_data_free", "accuracy_batchnorm", "accuracy_finetuned")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("speed", "accuracy"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", help="codebook sizes K")
    parser.add_argument(
        "--weights", help="safetensors state dict: ResNet-50's (speed) or the dense network's"
    )
    parser.add_argument("--experiment", default="digits", choices=("digits", "keywords", "cifar100"))
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--epochs", type=int, default=10, help="of codebook fine-tuning")
    parser.add_argument("--dense-epochs", type=int, help="of the dense network, instead of the recipe's")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="one dense network each; with --weights one is enough",
    )
    parser.add_argument("--scales", nargs="+", default=["none", "row"], choices=("none", "layer", "row"))
    parser.add_argument("--output", help="folder of the JSON result", default=str(HERE / "results"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    result = speed(options) if options.part == "speed" else accuracy(options)
    name = "speed" if options.part == "speed" else options.experiment
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"legonet-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["table"])
    for target, met in result.get("targets", {}).items():
        print(f"{target}: {'yes' if met else 'no'}")
    return 0


# --- speed ------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Our k-means and scikit-learn's MiniBatchKMeans on the same blocks, one after the other, same threads."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    torch.manual_seed(0)
    net = imagenet_resnet50()
    if options.weights:
        net.load_state_dict(load_file(options.weights))
    blocks = torch.cat([to_blocks(p, 4) for p in net.parameters() if p.ndim >= 2])
    energy = float(blocks.square().sum(1).mean(dtype=torch.float64))
    array = blocks.numpy()
    rows: list[dict[str, Any]] = []

    def add(size: int, name: str, run: Callable[[], float]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        distortion = run()
        rows.append(
            {
                "codebook_size": size,
                "method": name,
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
                "relative_error": distortion / energy,
            }
        )
        print(rows[-1], flush=True)

    def theirs(size: int, batch: int) -> float:
        fitted = MiniBatchKMeans(size, batch_size=batch, n_init=1, random_state=0).fit(array)
        return float(fitted.inertia_) / len(array)

    kmeans(blocks[:70_000], 4)  # threads and memory are there before the clock starts
    with threadpool_limits(options.threads):
        for size in options.sizes or (32,):
            add(size, "this package", lambda size=size: kmeans(blocks, size).distortion)  # type: ignore[misc]
            add(
                size,
                "this package, sample only",
                lambda size=size: kmeans(blocks, size, full_passes=0).distortion,
            )  # type: ignore[misc]
            for batch in (1024, 16_384):
                add(size, f"MiniBatchKMeans, batch {batch}", lambda s=size, b=batch: theirs(s, b))  # type: ignore[misc]
    weights = f"weights from {Path(options.weights).name}" if options.weights else "initial weights (seed 0)"
    lines = [
        f"ResNet-50, {weights}: {len(blocks)} blocks of 4 x 4, {options.threads} threads; "
        "error is the blocks' squared error / energy",
        "",
        "| K | method | seconds | CPU seconds | error |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['codebook_size']} | {row['method']} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | "
            f"{row['relative_error']:.4f} |"
        )
    return {
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "blocks": len(blocks),
        "threads": options.threads,
        "rows": rows,
        "targets": targets(rows),
        "table": "\n".join(lines),
    }


def targets(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """K = 32: under 60 s, and faster than every run of scikit-learn's at equal or better distortion."""
    at = [row for row in rows if row["codebook_size"] == 32]
    if not at:
        return {}
    ours, theirs = at[0], [row for row in at if row["method"].startswith("MiniBatchKMeans")]
    return {
        "under 60 s": ours["seconds"] < 60,
        "faster than MiniBatchKMeans": all(ours["seconds"] < row["seconds"] for row in theirs),
        "distortion not above MiniBatchKMeans": all(
            ours["relative_error"] <= row["relative_error"] for row in theirs
        ),
    }


# --- accuracy ---------------------------------------------------------------------------------------------


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """Per seed one trained network; every codebook size, without data, with BatchNorm statistics, fine-tuned."""
    recipe = json.loads((HERE / "recipes" / f"{options.experiment}-cpu.json").read_text())
    experiment = open_experiment(recipe, options.data, HERE / "cache")
    parts = [one_seed(experiment, recipe, options, seed) for seed in options.seeds]
    dense = [part["dense_accuracy"] for part in parts]
    rows = [combined(list(cells)) for cells in zip(*(part["rows"] for part in parts), strict=True)]
    labels = torch.as_tensor(experiment.test.labels)
    majority = float(labels.bincount().max()) / len(labels)
    return {
        "experiment": experiment.name,
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "seeds": options.seeds,
        "dense_accuracy": spread(dense),
        "majority": majority,
        "epochs": options.epochs,
        "rows": rows,
        "table": table(rows, experiment, dense, majority, options),
        "per_seed": parts,
    }


def one_seed(
    experiment: Experiment, recipe: dict[str, Any], options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Everything about the network of one seed, which is also that of k-means and of the order of batches."""
    model = trained(experiment, recipe, options.weights, options.dense_epochs, seed)
    calibration = [inputs for inputs, _ in experiment.batches(experiment.train)]
    train = experiment.train_loader(batch_size=recipe["finetune"]["batch_size"], seed=seed)

    def test(packed: PackedModel | None) -> float:
        net = model if packed is None else expand_into(packed, model)
        return float(evaluate(net, experiment.batches(experiment.test)).accuracy)

    dense, rows = test(None), []
    for scale in options.scales:
        for size in options.sizes or (16, 32, 256, 2048):
            config = LegoNetConfig(codebook_size=size, scale=scale, seed=seed)
            packed = pack(model, config)
            report = measure(packed, model)
            context = Context(calibration_data=calibration)
            restored = compress(model, config.replace(reestimate_batchnorm=True), context)
            tuned = finetune_codebook(packed, model, train, epochs=options.epochs)
            row = {
                **report.to_dict(),
                "scale": scale,
                "claimed_ratio": CLAIMED.get(size),
                "accuracy_data_free": test(packed),
                "accuracy_batchnorm": test(restored),
                "accuracy_finetuned": test(tuned),
            }
            del row["layer_errors"]
            rows.append(row)
            print(f"seed {seed}, K = {size}, scale {scale}: {report}", flush=True)
    return {"seed": seed, "dense_accuracy": dense, "rows": rows}


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean, and standard deviation where there are several."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def combined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of all seeds: accuracies with their spread, the weights' error and the ratios as means."""
    result = dict(rows[0])
    for key in ("packed_bytes", "ratio", "relative_error"):
        result[key] = statistics.fmean(row[key] for row in rows)
    for key in ACCURACIES:
        result[key] = spread([row[key] for row in rows])
    return result


def percent(value: dict[str, float | None]) -> str:
    """``12.34 ± 0.56`` of shares of 1."""
    mean, deviation = value["mean"], value["sd"]
    assert mean is not None
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def table(
    rows: list[dict[str, Any]],
    experiment: Experiment,
    dense: list[float],
    majority: float,
    options: argparse.Namespace,
) -> str:
    """Markdown."""
    seeds = f"{len(dense)} seeds, mean ± sd" if len(dense) > 1 else "one seed"
    lines = [
        f"{experiment.name}, {seeds}: dense {percent(spread(dense))} % on {len(experiment.test)} test samples (most "
        f"frequent class {100 * majority:.2f} %), {rows[0]['dense_bytes']} bytes; "
        f"codebook fine-tuned for {options.epochs} epochs",
        "",
        "| K | scale | claimed | indices only | file | weight error | Gaussian floor "
        "| no data | + BatchNorm | fine-tuned |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        cells = [
            str(row["codebook_size"]),
            row["scale"],
            f"{row['claimed_ratio']}×, no loss" if row["claimed_ratio"] else "–",
            f"{row['index_ratio']:.1f}×",
            f"{row['ratio']:.1f}×",
            f"{row['relative_error']:.3f}",
            f"{row['gaussian_floor']:.3f}",
            *(percent(row[key]) for key in ACCURACIES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trained(
    experiment: Experiment, recipe: dict[str, Any], weights: str | None, epochs: int | None, seed: int
) -> nn.Module:
    """The dense network: given weights, or trained once by the recipe (or so many epochs) and kept in the cache."""
    model = experiment.model(seed=seed)
    name = f"{experiment.name}-dense-{epochs or 'recipe'}-seed{seed}.safetensors"
    kept = Path(weights) if weights else HERE / "cache" / name
    if kept.exists():
        model.load_state_dict(load_file(kept))
        return model.eval()
    settings = TrainRecipe(**{**recipe["dense"], **({"epochs": epochs} if epochs else {})})
    loader = experiment.train_loader(batch_size=settings.batch_size, seed=seed)
    finetune(model, loader, recipe=settings, progress=False, seed=seed)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), kept)
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
