"""LegoNet as published, measured: speed of the clustering, real bytes, weight error, accuracy.

    python benchmarks/legonet.py speed                     # ResNet-50's blocks against scikit-learn
    python benchmarks/legonet.py accuracy                  # a network trained here on scikit-learn's digits
    python benchmarks/legonet.py accuracy --experiment keywords --data FOLDER --weights dense.safetensors

``accuracy`` takes the experiments of ``benchmarks/run.py`` (digits, keywords, cifar100); without ``--weights`` it
trains the recipe's dense network first. No choice is made on the test part: every row that is computed is printed.
Results are written to ``benchmarks/results/legonet-<name>.json``.
"""

from __future__ import annotations

import argparse
import json
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
    return {"blocks": len(blocks), "threads": options.threads, "rows": rows, "table": "\n".join(lines)}


# --- accuracy ---------------------------------------------------------------------------------------------


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    """One trained network; every codebook size, without data, with BatchNorm statistics, fine-tuned."""
    recipe = json.loads((HERE / "recipes" / f"{options.experiment}-cpu.json").read_text())
    experiment = open_experiment(recipe, options.data, HERE / "cache")
    model = trained(experiment, recipe, options.weights, options.dense_epochs)
    calibration = [inputs for inputs, _ in experiment.batches(experiment.train)]
    train = experiment.train_loader(batch_size=recipe["finetune"]["batch_size"], seed=0)

    def test(packed: PackedModel | None) -> float:
        net = model if packed is None else expand_into(packed, model)
        return float(evaluate(net, experiment.batches(experiment.test)).accuracy)

    dense, rows = test(None), []
    majority = float(torch.as_tensor(experiment.test.labels).bincount().max()) / len(experiment.test)
    for scale in options.scales:
        for size in options.sizes or (16, 32, 256, 2048):
            config = LegoNetConfig(codebook_size=size, scale=scale)
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
            rows.append(row)
            print(f"K = {size}, scale {scale}: {report}", flush=True)
    lines = [
        f"{experiment.name}: dense {100 * dense:.2f} % on {len(experiment.test)} test samples (most frequent class "
        f"{100 * majority:.2f} %), {rows[0]['dense_bytes']} bytes; codebook fine-tuned for {options.epochs} epochs",
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
            *(f"{100 * row[f'accuracy_{key}']:.2f}" for key in ("data_free", "batchnorm", "finetuned")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return {
        "experiment": experiment.name,
        "dense_accuracy": dense,
        "majority": majority,
        "epochs": options.epochs,
        "rows": rows,
        "table": "\n".join(lines),
    }


def trained(
    experiment: Experiment, recipe: dict[str, Any], weights: str | None, epochs: int | None
) -> nn.Module:
    """The dense network: given weights, or trained once by the recipe (or so many epochs) and kept in the cache."""
    model = experiment.model(seed=0)
    kept = Path(weights) if weights else HERE / "cache" / f"{experiment.name}-dense-{epochs}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))
        return model.eval()
    settings = TrainRecipe(**{**recipe["dense"], **({"epochs": epochs} if epochs else {})})
    loader = experiment.train_loader(batch_size=settings.batch_size, seed=0)
    finetune(model, loader, recipe=settings, progress=False)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), kept)
    return model.eval()


if __name__ == "__main__":
    raise SystemExit(main())
