"""PointNet++ at 1 024 points for ``deploy.py``: what runs in torch, and tails in other runtimes.

Farthest point sampling and ball queries stop exporters, so the backbone (SA1, SA2, 5 % of the path's bytes)
runs in torch for every variant, and bundles hold the tails.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from accuracy.arms import pruned as pruned_to
from sigmab_plugin import SigmaBConfig, SigmaBPruner
from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.deploy import export, export_chain
from sigmab_plugin.errors import SigmaBError
from sigmab_plugin.models import PointNet2
from sigmab_plugin.tree import SigmaBNet

NAME = "pointnet2-1024"
POINTS = 1024


@dataclass(frozen=True)
class Points:
    """The networks, their counts, and why bundles that are missing cannot be made: format -> reason."""

    dense: nn.Module
    pruned: nn.Module
    net: SigmaBNet
    counts: dict[str, Any]
    whole: dict[str, str]
    tails: dict[str, str]

    @property
    def backbones(self) -> dict[str, Callable[..., Any]]:
        def front(model: Any) -> Callable[..., Any]:
            @torch.inference_mode()
            def compute(pos: Tensor, batch: Tensor) -> Any:
                return model.sa2(*model.sa1(*model.input(pos, batch)))

            return compute

        @torch.inference_mode()
        def tree(pos: Tensor, batch: Tensor) -> Any:
            return self.net.backbone(pos, batch)

        return {"dense": front(self.dense), "pruned": front(self.pruned), "sigmab": tree}


class _Tail(nn.Module):
    """What follows the backbone, for one cloud: the pooling of several stops exporters where it ends a chain."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.mlp = model.sa3.mlp
        self.end = nn.Sequential(model.fc1, model.head)

    def forward(self, x: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        pooled = self.mlp(torch.cat([x, pos], dim=1)).amax(0, keepdim=True)
        # The one cloud's number is 0: OpenVINO drops inputs that nothing uses.
        logits: Tensor = self.end(pooled + batch.amax(0).to(x.dtype))
        return logits


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (count * 1 024, 3) inside the unit sphere, and the cloud of each."""
    points = torch.randn(count, POINTS, 3, generator=torch.Generator().manual_seed(seed))
    points /= points.norm(dim=2).amax(1)[:, None, None]
    return points.reshape(-1, 3), torch.arange(count).repeat_interleave(POINTS)


def prepare_points(cache: Path, formats: tuple[str, ...]) -> Points:
    """Build the networks, the same ones every time, and export what is missing in ``cache``."""
    torch.manual_seed(0)
    dense = PointNet2(40).eval()
    pruner = SigmaBPruner(
        dense, clouds(2, 1), calibration_data=[clouds(16, 2)], config=SigmaBConfig.preset("pointnet2")
    )
    net: SigmaBNet = pruner.step().eval()
    net_active = net.parameter_counts().active
    pruned = pruned_to(dense, clouds(2, 1), "magnitude", target=net_active, data=None).eval()  # type: ignore[arg-type]
    one = clouds(1, 3)
    counts = {
        "dense": {"parameters": parameter_count(dense), "macs": macs(dense, one)},
        "pruned": {"parameters": parameter_count(pruned), "macs": macs(pruned, one)},
        "sigmab": {
            "parameters": net_active,
            "total": net.parameter_counts().total,
            "backbone": net.parameter_counts().backbone,
            "macs": net.macs(one).active,
        },
    }
    root = cache / NAME
    root.mkdir(parents=True, exist_ok=True)
    points = Points(dense, pruned, net, counts, {}, {})
    for form in formats:
        points.whole.update(
            _tried(root, f"whole-{form}", form, lambda t, f=form: export(net, clouds(2, 1), t, format=f))
        )
        points.tails.update(_tried(root, f"tails-{form}", form, lambda t, f=form: _tails(points, root, f)))
    return points


def _tails(points: Points, root: Path, form: str) -> None:
    layout = "native" if form == "onnx" else "portable"
    example = clouds(2, 1)
    target = root / f"sigmab-{form}"
    export(points.net, example, target, format=form, layout=layout, backbone=False, overwrite=True)
    for kind, model in (("dense", points.dense), ("pruned", points.pruned)):
        # Inference tensors cannot be traced.
        frontier = tuple(t.clone() for t in points.backbones[kind](*clouds(1, 1)))
        tail = _Tail(model).eval()
        export_chain([tail], frontier, root / f"{kind}-{form}", format=form, layout=layout, overwrite=True)


def _tried(root: Path, name: str, form: str, make: Callable[[Path], Any]) -> dict[str, str]:
    """Make something once; what it failed with is kept beside what was made."""
    record = root / f"{name}.json"
    if not record.exists():
        reason = None
        try:
            make(root / name)
        except SigmaBError as error:
            reason = str(error).partition("\n")[0]
        record.write_text(json.dumps({"failed": reason}))
    failed = json.loads(record.read_text())["failed"]
    return {} if failed is None else {form: failed}
