"""SigmaB and int8 together, in one run: accuracy, bytes and latency in two runtimes.

Trained networks are taken through NNCF 3's functions:

* ``dense`` and ``dense + int8``;
* ``sigmab`` and ``sigmab + int8``, calibrated per leaf, and with shared statistics for comparison;
* ``twin`` and ``twin + int8``: the static twin, one path of the same shape cut by Torch-Pruning's dependency graph;
* with ``--networks``, ``pruned`` and ``pruned + int8``: what Torch-Pruning makes at the tree's active parameters.

Without ``--networks`` a small ResNet is trained here on scikit-learn's digits (real, offline), every network for the
same number of epochs. With it, the networks are those that ``benchmarks/run.py`` has trained::

    python benchmarks/nncf_int8.py --output benchmarks/results/nncf_int8.json
    python benchmarks/run.py keywords --data FOLDER --out runs/keywords
    python benchmarks/nncf_int8.py --experiment keywords --data FOLDER --networks runs/keywords --output FILE

Latencies are worth what the machine's load allows; it is recorded beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

Data = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Data, Data]:
    """Training and test images (N, 1, 8, 8) with their classes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 8.0 - 1.0).astype(np.float32)
    parts = train_test_split(images, targets, test_size=0.4, random_state=0, stratify=targets)
    x_train, x_test, y_train, y_test = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return (x_train, y_train), (x_test, y_test)


def train(net: nn.Module, data: Data, epochs: int, learning_rate: float) -> nn.Module:
    """Adam with a cosine schedule; eq. 8 for a tree, cross-entropy for anything else."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        TensorDataset(*data), batch_size=64, shuffle=True, generator=generator, drop_last=True
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    net.train()
    for _ in range(epochs):
        for images, targets in loader:
            loss = (
                net.loss(images, targets) if hasattr(net, "leaves") else F.cross_entropy(net(images), targets)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def accuracy(predict: Any, data: Data) -> float:
    images, targets = data
    with torch.no_grad():
        output = predict(images)
    return round(100.0 * float((torch.as_tensor(output).argmax(1) == targets).float().mean()), 2)


def latency(predict: Any, image: np.ndarray, repeats: int) -> float:
    """Median milliseconds of one batch-1 inference."""
    for _ in range(20):
        predict(image)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        predict(image)
        times.append(time.perf_counter() - start)
    return round(1000.0 * statistics.median(times), 3)


def runtimes(net: nn.Module, data: Data, work: Path, *, quantized: bool, repeats: int) -> dict[str, Any]:
    """Bytes of the bundles, accuracy and latency in OpenVINO and ONNX Runtime."""
    from sigmab_plugin.deploy import Runner, export, export_chain
    from sigmab_plugin.hosts.nncf_v3_export import export as export_quantized

    facts: dict[str, Any] = {}
    example = data[0][:2]
    for form in ("openvino", "onnx"):
        directory = work / form
        if quantized:
            manifest = export_quantized(net, example, directory, format=form)
        elif hasattr(net, "leaves"):
            manifest = export(net, example, directory, format=form)
        else:
            manifest = export_chain([net], example, directory, format=form)
        paths = [sum(n.weights.nbytes for n in manifest.path_nodes(leaf)) for leaf in manifest.leaves]
        with Runner(directory, threads=1) as runner:
            facts[form] = {
                "accuracy": accuracy(lambda x: runner(x.numpy()), data),
                "stored_bytes": sum(node.weights.nbytes for node in manifest.nodes),
                "active_bytes": max(paths),
                "latency_ms": latency(runner, data[0][:1].numpy(), repeats),
            }
    return facts


@dataclass(frozen=True)
class Subject:
    """Trained networks in eval mode, and the data they were trained for.

    Attributes:
        controls: static networks of about the tree's active size, by name.
        batches: calibration batches ``(inputs, targets)``; test: inputs and targets; facts: for the record.
    """

    dense: nn.Module
    tree: Any
    controls: dict[str, nn.Module]
    batches: list[Data]
    test: Data
    facts: dict[str, Any]


def trained_on_digits(epochs: int, width: float) -> Subject:
    """A ResNet, its tree and its twin, trained now."""
    from sigmab_plugin import SigmaBConfig, static_twin
    from sigmab_plugin.hosts.nncf_v3 import compress
    from sigmab_plugin.models import BasicBlock, ResNet

    torch.manual_seed(0)
    train_data, test_data = digits()
    batches = [(x, y) for x, y in zip(train_data[0].split(64), train_data[1].split(64), strict=True)]
    section = {"algorithm": "sigmab", "levels": ["layer3", "layer4"], "head": "fc", "projection_dim": 32}
    make = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, stem="cifar", width=width, in_channels=1)
    dense = train(make, train_data, 2 * epochs, 3e-3)
    tree = compress(dense, {"compression": section}, [x for x, _ in batches])
    train(tree, train_data, epochs, 1e-3)
    config = SigmaBConfig.from_dict(section)
    twin = static_twin(dense, train_data[0][:8], config=config, calibration_data=batches)
    train(twin, train_data, epochs, 1e-3)
    train(dense, train_data, epochs, 1e-3)
    facts = {
        "data": f"scikit-learn digits, {len(train_data[1])} training and {len(test_data[1])} test images",
        "epochs": {"dense": 3 * epochs, "tree and twin": epochs, "after quantization": 0},
    }
    return Subject(dense, tree, {"twin": twin}, batches, test_data, facts)


def trained_before(
    experiment_name: str, data: list[str], networks: Path, *, seed: int, arms: tuple[str, ...], cache: Path
) -> Subject:
    """What ``benchmarks/run.py`` has left in ``networks``; nothing is trained here.

    ``arms`` are the tree's and those of its controls. Their structure is made again from the dense network and the
    seed, then the weights are loaded.
    """
    from accuracy.arms import build_arm
    from accuracy.experiments import open_experiment
    from sigmab_plugin.tuning import load_weights

    recipe = json.loads((HERE / "recipes" / f"{experiment_name}-cpu.json").read_text())
    experiment = open_experiment(recipe, data, cache)
    dense = experiment.model(seed)
    load_weights(networks / f"dense-seed{seed}" / "last.safetensors", dense)
    dense.eval()
    built = []
    for arm in arms:
        torch.manual_seed(seed)
        net = build_arm(experiment, recipe, recipe["arms"][arm], dense, seed=seed)
        load_weights(networks / f"{arm}-seed{seed}" / "last.safetensors", net)
        built.append(net.eval())
    batches = list(experiment.batches(experiment.train, batch_size=64))
    inputs, targets = zip(*experiment.batches(experiment.test), strict=True)
    facts = {
        "data": f"{experiment_name}, {len(experiment.train)} training and {len(experiment.test)} test samples",
        "note": recipe["note"],
        "arms": [*arms],
        "seed": seed,
        "epochs": {
            "dense": recipe["dense"]["epochs"],
            "tree and controls": recipe["finetune"]["epochs"],
            "after quantization": 0,
        },
    }
    kinds = {"twin": "twin", "torch_pruning": "pruned"}
    controls = {kinds[recipe["arms"][arm]["kind"]]: net for arm, net in zip(arms[1:], built[1:], strict=True)}
    return Subject(dense, built[0], controls, batches, (torch.cat(inputs), torch.cat(targets)), facts)


def run(subject: Subject, repeats: int) -> dict[str, Any]:
    import nncf

    from sigmab_plugin.hosts.nncf_v3 import compress

    nncf.set_log_level(logging.ERROR)
    calibration = nncf.Dataset(subject.batches, lambda batch: batch[0])
    int8 = {"algorithm": "quantization", "preset": "mixed", "subset_size": 512}
    dense, tree, test_data = subject.dense, subject.tree, subject.test
    quantize = {"compression": int8}
    networks: dict[str, tuple[nn.Module, bool]] = {
        "dense": (dense, False),
        "dense + int8": (compress(dense, quantize, calibration), True),
        "sigmab": (tree, False),
        "sigmab + int8, per leaf": (compress(tree, quantize, calibration), True),
        "sigmab + int8, shared": (compress(tree, quantize, calibration, per_leaf_calibration=False), True),
    }
    for name, control in subject.controls.items():
        networks[name] = (control, False)
        networks[f"{name} + int8"] = (compress(control, quantize, calibration), True)
    before = os.getloadavg()[0]
    rows = []
    for name, (net, quantized) in networks.items():
        with tempfile.TemporaryDirectory() as work:
            facts = runtimes(net, test_data, Path(work), quantized=quantized, repeats=repeats)
        rows.append({"network": name, "torch_accuracy": accuracy(net, test_data), **facts})
        print(json.dumps(rows[-1]), flush=True)
    return {
        "command": " ".join(["python", "benchmarks/nncf_int8.py", *public(sys.argv[1:])]),
        **subject.facts,
        "versions": {
            name: version(name) for name in ("torch", "nncf", "openvino", "onnxruntime", "torch-pruning")
        },
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 1) for load in (before, os.getloadavg()[0])],
        "leaf_shares": tree.route(test_data[0]).bincount(minlength=4).tolist(),
        "rows": rows,
    }


def public(words: list[str]) -> list[str]:
    """The command for the record, without the folders of this machine."""
    return [
        Path(word).name if before in ("--data", "--networks", "--cache", "--output") else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def table(result: dict[str, Any]) -> str:
    first, last = result["load_average"]
    load = f"{result['cores']} cores, load {first} to {last}"
    lines = [
        "| network | torch | OpenVINO | ONNX Runtime | stored kB | active kB "
        f"| OpenVINO ms ({load}) | ONNX Runtime ms ({load}) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ov, onnx = row["openvino"], row["onnx"]
        lines.append(
            f"| {row['network']} | {row['torch_accuracy']:.2f} | {ov['accuracy']:.2f} | {onnx['accuracy']:.2f} "
            f"| {ov['stored_bytes'] / 1e3:.1f} | {ov['active_bytes'] / 1e3:.1f} "
            f"| {ov['latency_ms']:.3f} | {onnx['latency_ms']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=300, help="inferences per latency")
    parser.add_argument("--width", type=float, default=0.5, help="of the ResNet; 1 is 64 to 512 channels")
    parser.add_argument("--experiment", default="digits", choices=("digits", "keywords", "cifar100"))
    parser.add_argument("--data", action="append", default=[], help="folder or file of the experiment's data")
    parser.add_argument("--networks", type=Path, help="folder of checkpoints of benchmarks/run.py")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=("sigmab-teacher", "twin-teacher", "pruned-magnitude-teacher"),
        help="the tree's arm, then its controls'",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the networks in --networks")
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="folder of decoded data")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.networks is not None:
        subject = trained_before(
            args.experiment, args.data, args.networks, seed=args.seed, arms=tuple(args.arms), cache=args.cache
        )
    elif args.experiment == "digits":
        subject = trained_on_digits(args.epochs, args.width)
    else:
        parser.error(
            f"--experiment {args.experiment} needs --networks, the folder that benchmarks/run.py wrote"
        )
    result = run(subject, args.repeats)
    print(table(result))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
