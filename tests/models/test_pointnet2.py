from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sigmab_plugin.counting import macs, parameter_count
from sigmab_plugin.errors import ConfigError, FormatError

pytest.importorskip("torch_geometric")

from sigmab_plugin.models import PointNet2, convert_ssg_state_dict
from sigmab_plugin.models.pointnet2 import first_points, order_points
from sigmab_plugin.models.pointops import farthest_point_sampling

SMALL = {"centres": (16, 8), "neighbours": (6, 5), "radii": (0.4, 0.8)}


@pytest.fixture
def clouds() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(3, 64, 3) * 2 - 1


def test_published_sizes() -> None:
    assert parameter_count(PointNet2(40)) == 1_475_688
    assert parameter_count(PointNet2(40, features=3)) == 1_475_880
    assert parameter_count(PointNet2(10)) == 1_467_978


def test_padded_neighbourhoods_cost_0_84_gmac() -> None:
    torch.manual_seed(0)
    assert macs(PointNet2(40), torch.rand(1, 1024, 3)) / 1e9 == pytest.approx(0.8375, rel=1e-3)


def test_every_form_of_input_gives_the_same_logits(clouds: Tensor) -> None:
    from torch_geometric.data import Batch, Data

    model = PointNet2(5, width=0.25, **SMALL).eval()
    flat, batch = clouds.flatten(0, 1), torch.arange(3).repeat_interleave(64)
    dense = model(clouds)
    assert dense.shape == (3, 5)
    assert torch.equal(model(flat, batch), dense)
    assert torch.equal(model(Batch.from_data_list([Data(pos=cloud) for cloud in clouds])), dense)
    torch.testing.assert_close(torch.cat([model(cloud) for cloud in clouds]), dense)


def test_ragged_batches_equal_single_clouds(clouds: Tensor) -> None:
    model = PointNet2(5, width=0.25, **SMALL).eval()
    parts = [clouds[0], clouds[1, :50], clouds[2, :5]]
    batch = torch.arange(3).repeat_interleave(torch.tensor([len(p) for p in parts]))
    torch.testing.assert_close(model(torch.cat(parts), batch), torch.cat([model(p) for p in parts]))


def test_repeating_neighbours_changes_no_maximum(clouds: Tensor) -> None:
    torch.manual_seed(1)
    table = PointNet2(5, width=0.25, **SMALL).eval()
    ragged = PointNet2(5, width=0.25, repeat=False, **SMALL).eval()
    ragged.load_state_dict(table.state_dict())
    torch.testing.assert_close(ragged(clouds), table(clouds))


def test_ordering_once_replaces_sampling(clouds: Tensor) -> None:
    torch.manual_seed(1)
    model = PointNet2(5, width=0.25, **SMALL).eval()
    prefix = PointNet2(5, width=0.25, sampling="prefix", **SMALL).eval()
    prefix.load_state_dict(model.state_dict())
    ordered = order_points(clouds, 40)
    batch = torch.arange(3).repeat_interleave(40)
    sampled = farthest_point_sampling(ordered.flatten(0, 1), batch, 16)
    assert torch.equal(sampled, first_points(batch, 16))
    assert torch.equal(prefix(ordered), model(ordered))


def test_ordering_starts_where_it_is_told(clouds: Tensor) -> None:
    starts = torch.tensor([5, 0, 63])
    ordered = order_points(clouds, 64, starts=starts)
    assert torch.equal(ordered[:, 0], clouds[torch.arange(3), starts])
    assert torch.equal(ordered.sort(dim=1).values, clouds.sort(dim=1).values)


def test_top_level_can_be_traced_with_children_as_leaves() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    graph = Tracer().trace(PointNet2(5))
    modules = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert modules == ["input", "sa1", "sa2", "sa3", "fc1", "head"]


def test_gradients_reach_every_parameter(clouds: Tensor) -> None:
    torch.manual_seed(0)
    model = PointNet2(5, width=0.25, random_start=True, **SMALL)
    F.cross_entropy(model(clouds), torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# --- the usual SSG checkpoint -----------------------------------------------------------------------------


def _ssg_state(features: int) -> dict[str, Tensor]:
    """Random weights in the layout of the usual SSG classifier."""
    layout = {"sa1": [3 + features, 64, 64, 128], "sa2": [131, 128, 128, 256], "sa3": [259, 256, 512, 1024]}
    state: dict[str, Tensor] = {}

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = torch.rand(size) + 0.5
        state[f"{name}.bias"] = torch.randn(size) * 0.1
        state[f"{name}.running_mean"] = torch.randn(size) * 0.1
        state[f"{name}.running_var"] = torch.rand(size) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for block, channels in layout.items():
        for i in range(3):
            shape = (channels[i + 1], channels[i], 1, 1)
            state[f"{block}.mlp_convs.{i}.weight"] = torch.randn(shape) / channels[i] ** 0.5
            state[f"{block}.mlp_convs.{i}.bias"] = torch.randn(channels[i + 1]) * 0.1
            norm(f"{block}.mlp_bns.{i}", channels[i + 1])
    for name, inputs, outputs in (("fc1", 1024, 512), ("fc2", 512, 256), ("fc3", 256, 40)):
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        state[f"{name}.bias"] = torch.randn(outputs) * 0.1
        if name != "fc3":
            norm(f"bn{name[-1]}", outputs)
    return state


def _ssg_forward(state: dict[str, Tensor], pos: Tensor, features: Tensor | None) -> Tensor:
    """That network's forward for one cloud, written out: groups are [xyz, features], then 1x1 convolutions."""

    def encode(block: str, group: Tensor) -> Tensor:  # (S, K, C) -> (S, C')
        x = group.permute(2, 1, 0)[None]  # (1, C, K, S)
        for i in range(3):
            x = F.conv2d(x, state[f"{block}.mlp_convs.{i}.weight"], state[f"{block}.mlp_convs.{i}.bias"])
            n = f"{block}.mlp_bns.{i}"
            x = F.batch_norm(
                x,
                state[f"{n}.running_mean"],
                state[f"{n}.running_var"],
                state[f"{n}.weight"],
                state[f"{n}.bias"],
            )
            x = F.relu(x)
        return x.amax(2)[0].t()

    def abstraction(block: str, pos: Tensor, x: Tensor | None, count: int, radius: float, limit: int):
        index = farthest_point_sampling(pos, torch.zeros(len(pos), dtype=torch.long), count)
        groups = []
        for centre in pos[index]:
            near = ((pos - centre).square().sum(1) <= radius**2).nonzero().squeeze(1)[:limit]
            near = torch.cat([near, near[:1].expand(limit - len(near))])
            relative = pos[near] - centre
            groups.append(relative if x is None else torch.cat([relative, x[near]], 1))
        return encode(block, torch.stack(groups)), pos[index]

    x, centres = abstraction("sa1", pos, features, 512, 0.2, 32)
    x, centres = abstraction("sa2", centres, x, 128, 0.4, 64)
    x = encode("sa3", torch.cat([centres, x], 1)[None])
    for i in (1, 2):
        x = F.linear(x, state[f"fc{i}.weight"], state[f"fc{i}.bias"])
        n = f"bn{i}"
        x = F.batch_norm(
            x, state[f"{n}.running_mean"], state[f"{n}.running_var"], state[f"{n}.weight"], state[f"{n}.bias"]
        )
        x = F.relu(x)
    return F.log_softmax(F.linear(x, state["fc3.weight"], state["fc3.bias"]), dim=1)


@pytest.mark.parametrize("features", [0, 3])
def test_usual_ssg_weights_give_the_same_log_probabilities(features: int) -> None:
    torch.manual_seed(features)
    state = _ssg_state(features)
    model = PointNet2(40, features=features).eval()
    model.load_state_dict(convert_ssg_state_dict(state))
    points = torch.rand(1024, 3 + features) * 2 - 1
    with torch.no_grad():
        found = F.log_softmax(model(points), dim=1)
        expected = _ssg_forward(state, points[:, :3], points[:, 3:] if features else None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_other_checkpoints_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match="conv1"):
        convert_ssg_state_dict({"conv1.weight": torch.zeros(1)})
    with pytest.raises(FormatError, match="model_state_dict"):
        convert_ssg_state_dict({"model_state_dict": torch.zeros(1)})


@pytest.mark.parametrize(
    "call",
    [
        lambda: PointNet2(5, width=0.0),
        lambda: PointNet2(5, sampling="random"),
        lambda: PointNet2(5, **SMALL).eval()(torch.rand(4, 2)),
        lambda: PointNet2(5, **SMALL).eval()(torch.rand(2, 64, 3), torch.zeros(2, dtype=torch.long)),
        lambda: order_points(torch.rand(2, 10, 3), 11),
    ],
    ids=["width", "sampling", "columns", "batch twice", "count"],
)
def test_bad_arguments_are_refused(call) -> None:
    with pytest.raises(ConfigError):
        call()


def test_importing_the_models_needs_no_torch_geometric() -> None:
    code = (
        "import sys, sigmab_plugin.models as m; m.cifar_resnet50; assert 'PointNet2' in dir(m); "
        "sys.exit('torch_geometric' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
