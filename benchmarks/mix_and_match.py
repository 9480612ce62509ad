"""Mix-and-Match: ten strategies with three scores on one trained network; best, mean and spread, test accuracy.

    python benchmarks/mix_and_match.py                      # a network trained here on scikit-learn's digits
    python benchmarks/mix_and_match.py --experiment keywords --data FOLDER --weights dense.safetensors
    python benchmarks/mix_and_match.py --structured         # channels instead of weights, by Torch-Pruning

Runs are chosen on the validation part. The test part is read for the dense network, for the chosen run, and for two
controls at its sparsity with the same fine-tuning: magnitude pruning with one threshold for all layers, and with one
sparsity for all layers. Resumable: runs are kept in ``--folder``. The result is a JSON file of ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from accuracy.experiments import open_experiment  # noqa: E402
from legonet import trained  # noqa: E402
from sigmab_plugin.counting import parameter_count  # noqa: E402
from sigmab_plugin.hosts.torch_pruning_techniques import MixAndMatchPruner  # noqa: E402
from sigmab_plugin.techniques.mix_and_match import (  # noqa: E402
    MixAndMatchConfig,
    SearchResult,
    build_masks,
    find_layers,
    finetune_masked,
    mask_sparsity,
    measure_sensitivity,
)
from sigmab_plugin.tuning import evaluate  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="digits", choices=("digits", "keywords", "cifar100"))
    parser.add_argument("--data", nargs="*", default=[])
    parser.add_argument("--weights", help="safetensors state dict of the dense network")
    parser.add_argument("--dense-epochs", type=int, help="of the dense network, instead of the recipe's")
    parser.add_argument("--scores", nargs="+", default=["magnitude", "gradient", "combined"])
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning, each run")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one dense network and search each")
    parser.add_argument("--max-drop", type=float, default=0.01, help="largest loss on the validation part")
    parser.add_argument("--structured", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where runs are kept", default=str(HERE / "cache" / "mix_and_match"))
    parser.add_argument("--output", help="folder of the JSON result", default=str(HERE / "results"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    result = run(options)
    name = options.experiment + ("-structured" if options.structured else "")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"mix_and_match-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["table"])
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The first seed in full; of the others what was chosen, and the spread over all."""
    parts = [one_seed(options, seed) for seed in options.seeds]
    first = parts[0]
    text = first["table"]
    if len(parts) > 1:
        text += "\n\n" + over_seeds(parts)
    command = "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
    return {**first, "command": command, "seeds": options.seeds, "table": text, "per_seed": parts}


def over_seeds(parts: list[dict[str, Any]]) -> str:
    """Markdown: test accuracy of the dense network, the chosen run and the controls, mean and deviation."""
    columns: dict[str, list[float]] = {
        "dense": [part["test"]["dense"] for part in parts],
        "chosen": [part["test"]["chosen"] for part in parts],
    }
    for part in parts:
        for row in part["controls"]:
            columns.setdefault(f"magnitude, {row['control']}", []).append(row["test"])
    sparsity = [part["chosen_sparsity"] for part in parts]
    lines = [
        f"{len(parts)} seeds, chosen sparsity {100 * statistics.fmean(sparsity):.1f} ± "
        f"{100 * statistics.stdev(sparsity):.1f} %:",
        "",
        "| | test, mean ± sd |",
        "|---|---|",
    ]
    for name, values in columns.items():
        lines.append(
            f"| {name} | {100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f} |"
        )
    return "\n".join(lines)


def one_seed(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One dense network, its search and the controls at the chosen sparsity."""
    recipe = json.loads((HERE / "recipes" / f"{options.experiment}-cpu.json").read_text())
    experiment = open_experiment(recipe, options.data, HERE / "cache")
    model = trained(experiment, recipe, options.weights, options.dense_epochs, seed)
    train = experiment.train_loader(batch_size=recipe["finetune"]["batch_size"], seed=seed)
    config = MixAndMatchConfig(
        seed=seed,
        scores=tuple(options.scores),
        finetune_epochs=options.epochs,
        finetune_lr=options.lr,
        max_drop=options.max_drop,
    )

    def score(net: nn.Module, part: Any) -> float:
        return float(evaluate(net, experiment.batches(part)).accuracy)

    pruner = MixAndMatchPruner(
        model,
        experiment.example(),
        config=config,
        validate=lambda net: score(net, experiment.val),
        train_data=train,
        structured=options.structured,
        folder=Path(options.folder)
        / f"{options.experiment}{'-structured' if options.structured else ''}-seed{seed}",
    )
    chosen = pruner.step()
    found = pruner.result
    controls: list[dict[str, Any]] = []
    if not options.structured:
        controls = [
            control(kind, model, found, config, experiment.example(), train)
            for kind in ("one threshold", "one sparsity")
        ]
        for row in controls:
            row["test"] = score(row.pop("network"), experiment.test)
    dense_test, chosen_test = score(model, experiment.test), score(chosen, experiment.test)
    return {
        **found.to_dict(),
        "experiment": experiment.name,
        "parameters": parameter_count(model),
        "chosen_sparsity": found.chosen.sparsity,
        "test": {"dense": dense_test, "chosen": chosen_test},
        "controls": controls,
        "table": table(experiment.name, found, dense_test, chosen_test, controls),
    }


def control(
    kind: str, model: nn.Module, found: SearchResult, config: MixAndMatchConfig, example: Any, train: Any
) -> dict[str, Any]:
    """Magnitude pruning at the chosen run's sparsity without ranges, roles or choice; fine-tuned alike."""
    layers = [layer for layer in find_layers(model, example, config) if layer.role != "normalization"]
    sensitivity = measure_sensitivity(model, layers, [next(iter(train))], hessian=False)
    importance = {layer.name: sensitivity.importance("magnitude", layer.name).flatten() for layer in layers}
    every = torch.cat(list(importance.values()))
    count = round(found.chosen.sparsity * parameter_count(model))
    threshold = every.sort().values[max(0, count - 1)]
    shares = {name: float((values <= threshold).double().mean()) for name, values in importance.items()}
    if kind == "one sparsity":
        shares = dict.fromkeys(importance, count / len(every))
    masks = build_masks(sensitivity, shares, "magnitude")
    net = copy.deepcopy(model)
    torch.manual_seed(config.seed)
    finetune_masked(net, masks, train, config)
    return {
        "control": kind,
        "network": net,
        "sparsity": mask_sparsity(masks, parameter_count(model)),
        "largest_layer_sparsity": max(shares.values()),
    }


def table(name: str, found: SearchResult, dense: float, chosen: float, controls: list[dict[str, Any]]) -> str:
    lines = [
        f"{name}: dense {100 * dense:.2f} % (test), {100 * found.dense:.2f} % (validation)",
        "",
        "| score | strategy | sparsity | validation |",
        "|---|---|---|---|",
    ]
    for run in found.runs:
        same = f" = {run.same_as.partition('-')[2]}" if run.same_as else ""
        lines.append(
            f"| {run.score} | {run.strategy}{same} | {100 * run.sparsity:.1f} % | {100 * run.validation:.2f} |"
        )
    lines += ["", "| score | best | mean ± sd over strategies | mean sparsity |", "|---|---|---|---|"]
    lines += [
        f"| {s.score} | {100 * s.best:.2f} | {100 * s.mean:.2f} ± {100 * s.sd:.2f} (n = {s.runs}) | "
        f"{100 * s.mean_sparsity:.1f} % |"
        for s in found.spreads()
    ]
    lines += [
        "",
        f"Chosen: {found.chosen.key}, sparsity {100 * found.chosen.sparsity:.1f} %, test {100 * chosen:.2f} %.",
    ]
    for row in controls:
        sparsities = (
            f"{100 * row['sparsity']:.1f} %, at most {100 * row['largest_layer_sparsity']:.1f} % in a layer"
        )
        lines.append(
            f"Control, magnitude with {row['control']} for all layers ({sparsities}), same fine-tuning: "
            f"test {100 * row['test']:.2f} %."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
