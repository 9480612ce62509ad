"""Set abstraction: the features are split, the coordinates behind them never."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_geometric")

from sigmab_plugin import SigmaBPruner
from sigmab_plugin.config import SigmaBConfig
from sigmab_plugin.errors import ModelError
from sigmab_plugin.models import PointNet2
from sigmab_plugin.tree.segments import call

from ..zoo import CASES

CLOUDS = next(case for case in CASES if case.name == "pointnet2")


def test_coordinates_are_never_split() -> None:
    torch.manual_seed(0)
    model = PointNet2(5, width=0.125).eval()
    batches = CLOUDS.batches()
    config = SigmaBConfig(levels=("sa2", "sa3"), head="fc1", projection_dim=16)
    pruner = SigmaBPruner(model, batches[0], config=config, calibration_data=batches)
    net = pruner.step().eval()
    outputs = {g.name: g for g in pruner.prepared.groups if g.is_output()}
    (name,) = (n for n in outputs if n.startswith("sa2"))
    width = outputs[name].size
    dense = model.get_parameter("sa3.mlp.lins.0.weight")
    assert dense.shape[1] == width + 3
    for leaf in net.leaves:
        kept = net.plan.kept(leaf)
        rows = kept["sa3.mlp.lins.0"]
        columns = torch.cat([kept[name], torch.arange(width, width + 3)])
        assert len(kept[name]) < width
        sliced = net.specializers[leaf.replace("/", "_")].get_parameter("sa3.mlp.lins.0.weight")
        assert torch.equal(sliced, dense[rows][:, columns])
    with torch.no_grad():
        assert torch.isfinite(call(net, batches[1])).all()


def test_a_cut_before_any_feature_is_refused() -> None:
    batches = CLOUDS.batches()
    config = SigmaBConfig(levels=("sa1", "sa2"), head="sa3", projection_dim=16)
    with pytest.raises(ModelError, match="must hold features"):
        SigmaBPruner(PointNet2(5, width=0.125), batches[0], config=config, calibration_data=batches)
