from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytest.importorskip("sklearn")
pytest.importorskip("torch_geometric")  # one module holds all experiments


@pytest.fixture(scope="module")
def report():
    """benchmarks/report.py by its file: ``report`` is a folder of tests, too."""
    spec = importlib.util.spec_from_file_location("benchmarks_report", BENCHMARKS / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, _benchmarks_on_path) -> Path:
    """Results of a tiny experiment on the digits: one epoch, four arms, two more without training."""
    import run

    folder = tmp_path_factory.mktemp("benchmark")
    recipe = json.loads((BENCHMARKS / "recipes/digits-cpu.json").read_text())
    recipe["dense"]["epochs"] = recipe["finetune"]["epochs"] = 1
    recipe["model"]["width"] = 0.125
    recipe["arms"] = {
        name: recipe["arms"][name]
        for name in ("sigmab", "twin", "twin-equal-teacher", "pruned-taylor-teacher")
    }
    untrained = {"kind": "twin", "config": {"repair": "least_squares"}, "train": {"epochs": 0}}
    recipe["arms"]["untrained-twin-repaired"] = untrained
    recipe["arms"]["untrained-twin-repaired-bn"] = {
        **untrained,
        "train": {"epochs": 0, "bn_reestimation": True},
    }
    (folder / "tiny.json").write_text(json.dumps(recipe))
    arguments = ["digits", "--recipe", str(folder / "tiny.json"), "--out", str(folder / "out")]
    arguments += ["--results", str(folder / "results"), "--seed", "3"]
    assert run.main(arguments) == 0
    written = {f.name: f.stat().st_mtime_ns for f in (folder / "results/tiny").iterdir()}
    assert run.main(arguments) == 0
    again = {f.name: f.stat().st_mtime_ns for f in (folder / "results/tiny").iterdir()}
    assert again == written, "finished results must not be run again"
    return folder / "results"


def _read(results: Path, arm: str) -> dict:
    return json.loads((results / "tiny" / f"{arm}-seed3.json").read_text())


@pytest.mark.slow
def test_controls_spend_what_the_tree_spends(finished: Path) -> None:
    tree = _read(finished, "sigmab")["counts"]["active_parameters"]
    assert _read(finished, "twin")["counts"]["active_parameters"] < tree
    for arm in ("twin-equal-teacher", "pruned-taylor-teacher"):
        assert _read(finished, arm)["counts"]["active_parameters"] == pytest.approx(tree, rel=0.02)
    samples = {_read(finished, arm)["train_samples"] for arm in ("sigmab", "twin", "pruned-taylor-teacher")}
    assert len(samples) == 1


@pytest.mark.slow
def test_results_say_how_they_were_made(finished: Path) -> None:
    record = _read(finished, "sigmab")
    assert (record["seed"], record["dense_seed"], record["epochs"]) == (3, 3, 1)
    assert record["command"].startswith("python benchmarks/run.py digits")
    assert str(finished) not in json.dumps(record)
    assert sum(record["test"]["leaf_shares"]) == pytest.approx(1, abs=1e-3)
    assert record["test"]["samples"] == 360
    assert {"torch", "torch-pruning", "machine", "train_seconds", "restructure_seconds"} <= record.keys()


@pytest.mark.slow
def test_arms_without_training(report, finished: Path) -> None:
    record, renewed = (_read(finished, f"untrained-twin-repaired{end}") for end in ("", "-bn"))
    assert (record["epochs"], record["train_samples"], record["train_seconds"]) == (0, 0, 0.0)
    assert record["val_accuracy"] == record["val_accuracy_before_finetuning"]
    assert renewed["val_accuracy_before_finetuning"] == record["val_accuracy"]
    assert renewed["robustness"] != record["robustness"]
    text = report.details(finished / "tiny")
    trained, _, untrained = text.partition("Without training")
    row = f"| static twin, least-squares repair | 1 | 0 | {record['test']['accuracy']:.2f} |"
    assert row in untrained
    assert row not in trained
    assert "| static twin | 1 | 1 |" in trained


@pytest.mark.slow
def test_a_table_that_was_edited_is_found(report, finished: Path, tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.md"
    blocks = ("<!-- results: tiny -->\n<!-- end results -->", "<!-- results:begin -->\n<!-- results:end -->")
    page.write_text("\n".join(["before", *blocks, "after", ""]))
    assert report.main(["--results", str(finished), "--check", str(page)]) == 1
    assert report.main(["--results", str(finished), "--write", str(page)]) == 0
    assert report.main(["--results", str(finished), "--check", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    accuracy = f"{_read(finished, 'twin')['test']['accuracy']:.2f}"
    assert text.count(f"| static twin | 1 | 1 | {accuracy} |") == 2
    figure = tmp_path / "figure.svg"
    for option, status in (("--check", 1), ("--write", 0), ("--check", 0)):
        assert report.main(["--results", str(finished), option, str(figure)]) == status
    assert f">{accuracy}</text>" in figure.read_text()
    page.write_text(text.replace(f"| static twin | 1 | 1 | {accuracy} |", "| static twin | 1 | 1 | 99.99 |"))
    capsys.readouterr()
    assert report.main(["--results", str(finished), "--check", str(page)]) == 1
    assert "99.99" in capsys.readouterr().out


def test_spread_is_mean_and_standard_deviation() -> None:
    from accuracy.tables import spread

    assert spread([90.0]) == "90.00"
    assert spread([90.0, 91.0, 92.0]) == "91.00 ± 1.00"


def test_a_page_without_markers_is_refused(report, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("no table")
    with pytest.raises(SystemExit, match="results: NAME"):
        report.main(["--check", str(tmp_path / "page.md")])


@pytest.mark.parametrize(
    "page", ["README.md", "benchmarks/README.md", "docs/deployment.md", "docs/accuracy.svg"]
)
def test_pages_state_what_the_result_files_hold(report, page: str) -> None:
    assert report.main(["--check", str(BENCHMARKS.parent / page)]) == 0


def test_pruned_networks_are_repaired_from_what_they_keep() -> None:
    """The slices name the dense network's own weights, and the repaired layers come nearer to its logits."""
    import torch

    from accuracy import arms
    from sigmab_plugin import SigmaBConfig
    from sigmab_plugin.counting import parameter_count
    from sigmab_plugin.data import ArrayDataset, Loader
    from sigmab_plugin.models import resnet

    torch.manual_seed(0)
    dense = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=7, width=0.25, stem="cifar").eval()
    images = torch.randn(300, 3, 8, 8).numpy()
    data = Loader(
        ArrayDataset(images, (images[:, 0, 0, 0] > 0).astype("int64"), ("a", "b"), "image"), batch_size=50
    )
    example = next(iter(data))[0]
    target = parameter_count(dense) // 3
    model, slices = arms._prune(dense, example, "magnitude", ratio=0.5, data=data)
    weights = dict(dense.named_parameters())
    assert slices.keys() == {
        name for name, p in model.named_parameters() if p.ndim > 1 and p.shape != weights[name].shape
    }
    for name, kept in slices.items():
        expected = weights[name]
        for dim, index in kept.items():
            expected = expected.index_select(dim, index)
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=0)
    errors = {}
    for repair in ("none", "least_squares"):
        config = SigmaBConfig(repair=repair, repair_samples=256)
        net = arms.pruned(dense, example, "magnitude", config=config, target=target, data=data).eval()
        assert parameter_count(net) == pytest.approx(target, rel=0.05)
        with torch.no_grad():
            errors[repair] = float((net(example) - dense(example)).square().mean())
    assert errors["least_squares"] < 0.5 * errors["none"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_cost_of_every_network(report, tmp_path: Path) -> None:
    import cost

    assert cost.main(["digits", "--results", str(tmp_path), "--steps", "2", "--repeats", "1"]) == 0
    record = json.loads((tmp_path / "cost-digits.json").read_text())
    rows = {row["network"]: row for row in record["rows"]}
    assert rows.keys() == cost.NETWORKS.keys()
    for name in ("dense", "SigmaB", "static twin", "Torch-Pruning, group magnitude"):
        assert rows[name]["step_milliseconds"] > 0
    for name in ("SigmaB", "static twin"):
        plain, repaired = rows[name], rows[f"{name}, repaired"]
        assert 0 < plain["making_seconds"] < repaired["making_seconds"]
        assert 0 < plain["making_mib"] < repaired["making_mib"]
    text = report.details(tmp_path / "cost")
    assert f"| static twin | {rows['static twin']['making_seconds']:.1f} |" in text
