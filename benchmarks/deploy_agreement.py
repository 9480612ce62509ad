"""Are the outputs of every backend those of torch's hard routing? On real images, with trained weights.

Used by ``deploy.py --images``. The dense network is restructured and repaired on training images; ``weights`` are a
checkpoint of it (safetensors), without which it keeps its random initialisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploy_timing import BACKENDS, Row
from sigmab_plugin import SigmaBConfig, SigmaBPruner
from sigmab_plugin.data import Loader, open_dataset
from sigmab_plugin.deploy import Runner, export
from sigmab_plugin.errors import SigmaBError
from sigmab_plugin.models import cifar_resnet50
from sigmab_plugin.tree import SigmaBNet
from sigmab_plugin.tuning import load_weights

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass(frozen=True)
class Images:
    """Where real images are, and a dense network for them.

    Attributes:
        path: a data set of 32 x 32 images, or a folder of ``cifar100-*.zip``.
        weights: of ``cifar_resnet50(classes, width=width)``; None for random ones.
    """

    path: Path
    weights: Path | None
    width: float
    count: int = 1000

    def split(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """``count`` images of a split, drawn evenly over it: (count, 3, 32, 32), (count,)."""
        archives = sorted(self.path.glob("cifar100-*.zip")) if self.path.is_dir() else []
        data = open_dataset(archives or self.path, split=name, mean=MEAN, std=STD)
        loader = Loader(data, batch_size=count, shuffle=True, seed=0)
        x, y = next(iter(loader))
        return x.contiguous(), y

    def network(self) -> SigmaBNet:
        x, _ = self.split("train", 1000)
        torch.manual_seed(0)
        dense = cifar_resnet50(100, width=self.width).eval()
        if self.weights is not None:
            load_weights(self.weights, dense)
        config = SigmaBConfig.preset("resnet50", seed=0, repair="least_squares")
        pruner = SigmaBPruner(dense, (x[:2],), calibration_data=list(x.split(250)), config=config)
        net: SigmaBNet = pruner.step().eval()
        return net


def agreement(images: Images, cache: Path, backends: Sequence[str], threads: int) -> Iterator[Row]:
    """One row per backend, as it is done: difference of logits, share of equal leaves, accuracy."""
    torch.set_num_threads(threads)
    net = images.network()
    x, labels = images.split("test", images.count)
    with torch.inference_mode():
        wanted = torch.cat([net(part) for part in x.split(50)]).numpy()
        leaves = torch.cat([net.route(part) for part in x.split(50)]).numpy()
    common = {
        "case": "resnet50-32",
        "width": images.width,
        "weights": "restructured and repaired on real images, dense network "
        + ("trained" if images.weights is not None else "random"),
        "parameters": net.parameter_counts().active,
        "images": len(x),
        "largest_logit": float(np.abs(wanted).max()),
        "leaf_counts": np.bincount(leaves, minlength=len(net.leaves)).tolist(),
        "correct_torch": float((wanted.argmax(1) == labels.numpy()).mean()),
    }
    for backend in backends:
        found: dict[str, Any] = {**common, "backend": backend}
        target = cache / f"agreement-{BACKENDS[backend]}"
        try:
            export(net, x[:2], target, format=BACKENDS[backend], overwrite=True)
            with Runner(target, backend=backend, threads=threads) as runner:
                got = [runner.run(part) for part in x.split(50)]
        except SigmaBError as error:
            yield {**found, "note": str(error).partition("\n")[0]}
            continue
        logits = np.concatenate([g.logits for g in got])
        same = np.concatenate([g.leaves for g in got]) == leaves
        apart = np.abs(logits - wanted).max(axis=1)
        yield {
            **found,
            "difference": float(apart.max()),
            "difference_on_same_leaf": float(apart[same].max()),
            "same_leaf": float(same.mean()),
            "other_leaf": int((~same).sum()),
            "correct": float((logits.argmax(1) == labels.numpy()).mean()),
        }
