"""The networks that ``deploy.py`` times, and their bundles, exported once and kept.

Weights are random: latency, bytes and memory do not depend on their values. Routers are re-centred on random
inputs so that every leaf occurs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigmab_plugin import SigmaBConfig, SigmaBPruner
from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.deploy import export, export_chain, export_single_file
from sigmab_plugin.models import cifar_resnet50, imagenet_resnet50
from sigmab_plugin.tree import SigmaBNet

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """A network and the inputs it is timed on."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    calibration_shape: tuple[int, ...]


CASES = {
    "resnet50-224": Case("resnet50-224", imagenet_resnet50, (3, 224, 224), (3, 96, 96)),
    "resnet50-32": Case("resnet50-32", cifar_resnet50, (3, 32, 32), (3, 32, 32)),
}


def dense_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.0), (module.running_var, 0.5, 1.5)):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
    return model


def sigmab_net(case: Case, model: nn.Module) -> SigmaBNet:
    x = torch.randn(16, *case.calibration_shape, generator=torch.Generator().manual_seed(1))
    pruner = SigmaBPruner(model, (x[:2],), calibration_data=[x], config=SigmaBConfig.preset("resnet50"))
    net: SigmaBNet = pruner.step().eval()
    balance(net, torch.randn(64, *case.calibration_shape, generator=torch.Generator().manual_seed(2)))
    return net


@torch.no_grad()
def balance(net: SigmaBNet, x: Tensor) -> None:
    """Shift every router to the median of random inputs: random weights send nearly all of them one way."""

    def visit(path: str, frontier: Tensor) -> None:
        router: Any = net.routers[path.replace("/", "_") or "root"]
        logits = router(net.modality.pool(frontier))
        margins = (logits[:, 1] - logits[:, 0]).sort().values
        router.linear.bias[0] += margins[len(margins) // 2 - 1 :][:2].mean() * router.temperature
        choice = router(net.modality.pool(frontier)).argmax(1)
        for branch in (0, 1):
            below = f"{path}/{branch}" if path else str(branch)
            if below in net.inner_nodes:
                visit(below, net.specializers[below.replace("/", "_")](frontier[choice == branch]))

    visit("", net.backbone(x))


def pruned_model(case: Case, target: int) -> nn.Module:
    """Torch-Pruning's magnitude pruner at the ratio whose parameter count comes nearest to ``target``."""
    import torch_pruning as tp

    def pruned(ratio: float) -> nn.Module:
        model = dense_model(case)
        example = (torch.randn(1, *case.calibration_shape),)
        pruner = tp.pruner.BasePruner(
            model,
            example,
            tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[model.fc],
            root_module_types=[nn.Conv2d, nn.Linear],
        )
        pruner.step()
        return model.eval()

    low, high = 0.0, 0.9
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if parameter_count(pruned(middle)) > target else (low, middle)
    candidates = [pruned(low), pruned(high)]
    return min(candidates, key=lambda m: abs(parameter_count(m) - target))


class _Part(nn.Module):
    """Some children of a ResNet, in a row."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(getattr(model, name) for name in names)
        self.flatten_at = names.index("fc") if "fc" in names else None

    def forward(self, x: Tensor) -> Tensor:
        for index, part in enumerate(self.parts):
            x = part(torch.flatten(x, 1) if index == self.flatten_at else x)
        return x


_PARTS = (
    ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"),
    ("layer3",),
    ("layer4", "avgpool", "fc"),
)


def links(model: nn.Module, *, split: bool) -> list[nn.Module]:
    """A ResNet as one link, or cut where SigmaB is cut, so that its reads can overlap computation too."""
    groups = _PARTS if split else (tuple(name for part in _PARTS for name in part),)
    return [_Part(model, names).eval() for names in groups]


#: No single files in these formats; and lowering a network once more for one row takes minutes.
_LEFT_OUT = {
    ("single", "torch"),
    ("single", "executorch"),
    *((kind, "executorch") for kind in ("dense-links", "pruned-links")),
}
KINDS = ("sigmab", "dense", "dense-links", "pruned", "pruned-links", "single")


def prepare(case: Case, cache: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Export what is missing in ``cache`` and return the counts of the networks."""
    directory = cache / case.name
    directory.mkdir(parents=True, exist_ok=True)
    counts = directory / "counts.json"
    example = torch.randn(2, *case.shape)
    wanted = {
        f"{kind}-{form}": (kind, form) for form in formats for kind in KINDS if (kind, form) not in _LEFT_OUT
    }
    missing = {name: what for name, what in wanted.items() if not (directory / name).exists()}
    if missing or not counts.exists():
        dense = dense_model(case)
        net = sigmab_net(case, dense)
        pruned = pruned_model(case, net.parameter_counts().active)
        one = torch.randn(1, *case.shape)
        sizes = {
            "dense": {"parameters": parameter_count(dense), "macs": macs(dense, one)},
            "pruned": {"parameters": parameter_count(pruned), "macs": macs(pruned, one)},
            "sigmab": {
                "parameters": net.parameter_counts().active,
                "total": net.parameter_counts().total,
                "macs": net.macs(one).active,
            },
        }
        for name, (kind, form) in missing.items():
            _log.info("exporting %s %s", case.name, name)
            target = directory / name
            layout = "native" if form == "onnx" else "portable"
            if kind == "sigmab":
                export(net, example, target, format=form, layout=layout)
            elif kind == "single":
                suffix = {"onnx": "onnx", "openvino": "xml"}[form]
                export_single_file(net, one, target / f"model.{suffix}", format=form)
            else:
                model = pruned if kind.startswith("pruned") else dense
                parts = links(model, split=kind.endswith("-links"))
                export_chain(parts, example, target, format=form, layout=layout)
        counts.write_text(json.dumps(sizes, indent=1))
    result: dict[str, Any] = json.loads(counts.read_text())
    return result
