"""The fine-tuning loop on real small networks: it learns, resumes exactly, and leaves alone what is not its own."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sigmab_plugin.errors import ConfigError, FormatError, TrainingError
from sigmab_plugin.tuning import TrainRecipe, evaluate, finetune, load_weights
from sigmab_plugin.tuning.recipe import as_recipe

from .nets import CLASSES, QUICK, dense, loader, same, samples, state, tree


def test_a_tree_learns_and_its_history_says_so() -> None:
    net = tree()
    history = finetune(net, loader(), epochs=8, recipe=QUICK, val_loader=loader(64, seed=1), progress=False)
    assert [record.epoch for record in history.records] == list(range(1, 9))
    assert history.complete
    assert history.leaves == net.leaves
    assert history.last.train_loss < 0.7 * history.records[0].train_loss
    assert history.best_accuracy is not None
    assert history.best_accuracy > 0.8
    assert history.last.val_accuracy == evaluate(net, loader(64, seed=1)).accuracy
    assert sum(history.last.leaf_shares) == pytest.approx(1.0)
    assert history.last.samples == 96


def test_a_plain_module_trains_through_the_same_loop() -> None:
    net = dense()
    history = finetune(net, loader(), epochs=8, recipe=QUICK, val_loader=loader(64, seed=1), progress=False)
    assert history.best_accuracy is not None
    assert history.best_accuracy > 0.8
    assert history.leaves == ()
    assert history.last.leaf_shares == ()
    assert history.last.balance is None


def test_a_plain_module_gets_the_steps_of_a_hand_written_loop() -> None:
    batches = list(loader(shuffle=False))
    net, twin = dense(), dense()
    recipe = QUICK.replace(schedule="constant", warmup_epochs=0.0, grad_clip=0.5)
    finetune(net, batches, epochs=2, recipe=recipe, progress=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    twin.train()
    for _ in range(2):
        for images, targets in batches:
            optimizer.zero_grad()
            criterion(twin(images), targets).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
    for (name, value), (_, expected) in zip(state(net).items(), state(twin).items(), strict=True):
        torch.testing.assert_close(value, expected, msg=name, rtol=1e-4, atol=1e-5)


def test_mode_frozen_parameters_and_random_state_are_left_as_found() -> None:
    net = tree()
    net.eval()
    net.specializers["0"].train()
    for parameter in net.backbone.parameters():
        parameter.requires_grad = False
    before = state(net.backbone[0])
    modes = {name: module.training for name, module in net.named_modules()}
    teacher = dense().train()
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    finetune(net, loader(), epochs=1, recipe=QUICK, teacher=teacher, progress=False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert same(state(net.backbone[0]), before)
    assert not any(p.requires_grad for p in net.backbone.parameters())
    assert net.routing == "auto"
    assert teacher.training
    assert same(state(teacher), state(dense()))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_frozen_backbone_keeps_weights_and_statistics() -> None:
    net = tree(dropout=0.2)
    before = state(net)
    flags = [p.requires_grad for p in net.parameters()]
    finetune(net, loader(), epochs=1, recipe=QUICK.replace(freeze_backbone=True), progress=False)
    after = state(net)
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"routers", "specializers", "heads"}
    assert [p.requires_grad for p in net.parameters()] == flags


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, optimizer: str) -> None:
    recipe = QUICK.replace(optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 1e-3, hard_epochs=1)
    options: dict[str, Any] = {
        "epochs": 4,
        "recipe": recipe,
        "progress": False,
        "val_loader": loader(32, seed=1),
    }
    whole = tree(dropout=0.3)
    history = finetune(whole, loader(), **options)

    first = tree(dropout=0.3)
    stopped = finetune(first, loader(), checkpoint_dir=tmp_path, max_seconds=0.0, **options)
    assert not stopped.complete
    assert len(stopped.records) == 1
    second = tree(dropout=0.3)
    torch.randn(100)
    resumed = finetune(second, loader(), checkpoint_dir=tmp_path, **options)
    assert resumed.complete
    assert same(state(second), state(whole))
    assert [r.train_loss for r in resumed.records] == [r.train_loss for r in history.records]

    third = tree(dropout=0.3)
    again = finetune(third, loader(), checkpoint_dir=tmp_path, **options)
    assert again == resumed
    assert same(state(third), state(whole))


def test_the_same_seed_gives_the_same_run_and_another_seed_another() -> None:
    nets = [tree(dropout=0.2) for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        torch.randn(seed + 3)
        finetune(net, loader(), epochs=1, recipe=QUICK, seed=seed, progress=False)
    assert same(state(nets[0]), state(nets[1]))
    assert not same(state(nets[0]), state(nets[2]))


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """The process is killed without warning, in the middle of an epoch."""
    program = textwrap.dedent(
        """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        import torch
        torch.set_num_threads(1)
        from nets import QUICK, loader, tree
        from sigmab_plugin.tuning import finetune

        class Deadly:
            def __init__(self, inner): self.inner, self.left = inner, int(sys.argv[3])
            def __len__(self): return len(self.inner)
            def __iter__(self):
                for batch in self.inner:
                    self.left -= 1
                    if self.left == 0:
                        os.kill(os.getpid(), 9)
                    yield batch

        options = {"epochs": 3, "recipe": QUICK, "checkpoint_dir": sys.argv[2], "progress": False}
        finetune(tree(dropout=0.2), Deadly(loader()), **options)
        """
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run([*command, "10"], check=False).returncode == -9
    assert json.loads((tmp_path / "log.json").read_text())["records"][-1]["epoch"] == 1
    subprocess.run([*command, "1000"], check=True)
    whole, resumed = tree(dropout=0.2), tree(seed=3)
    finetune(whole, loader(), epochs=3, recipe=QUICK, progress=False)
    load_weights(tmp_path / "last.safetensors", resumed)
    assert same(state(resumed), state(whole))


def test_best_checkpoint_and_logs(tmp_path: Path) -> None:
    net = tree()
    val = loader(64, seed=1)
    history = finetune(
        net, loader(), epochs=4, recipe=QUICK, val_loader=val, checkpoint_dir=tmp_path, progress=False
    )
    other = tree(seed=3)
    scalars = load_weights(tmp_path / "best.safetensors", other)
    assert scalars == {"epoch": history.best_epoch, "val_accuracy": history.best_accuracy}
    assert evaluate(other, val).accuracy == history.best_accuracy
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.safetensors",
        "last.safetensors",
        "log.csv",
        "log.json",
    ]
    log = json.loads((tmp_path / "log.json").read_text())
    assert log == history.to_dict()
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["train_loss"]) for row in rows] == [r.train_loss for r in history.records]
    assert float(rows[-1]["share_1/0"]) == history.last.leaf_shares[2]


def test_bf16_autocast_learns() -> None:
    net = tree()
    recipe = QUICK.replace(amp=True)
    history = finetune(net, loader(), epochs=6, recipe=recipe, val_loader=loader(64, seed=1), progress=False)
    assert history.best_accuracy is not None
    assert history.best_accuracy > 0.8
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_a_teacher_pulls_the_leaves_towards_itself() -> None:
    teacher = dense(seed=4).eval()
    images, _ = samples(64, seed=1)
    labels = teacher(images).argmax(1).detach()
    agreement = {}
    for weight in (0.0, 5.0):
        net = tree()
        recipe = QUICK.replace(distillation_weight=weight)
        given = teacher if weight else None
        finetune(net, loader(), epochs=6, recipe=recipe, teacher=given, progress=False)
        net.eval()
        agreement[weight] = float((net(images).argmax(1) == labels).float().mean())
    assert agreement[5.0] > agreement[0.0]


def test_hard_phase_and_temperature_change_the_training() -> None:
    results = {}
    for name, changes in {
        "plain": {},
        "hard": {"hard_epochs": 1},
        "annealed": {"router_temperature": 4.0},
    }.items():
        net = tree()
        finetune(net, loader(), epochs=2, recipe=QUICK.replace(**changes), progress=False)
        results[name] = state(net)
    assert not same(results["plain"], results["hard"])
    assert not same(results["plain"], results["annealed"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_routers_learn_at_their_own_rate(optimizer: str) -> None:
    recipe = QUICK.replace(optimizer=optimizer, lr=0.01)
    moved = {}
    for factor in (0.0, 0.1, 1.0):
        net = tree()
        before = state(net)
        history = finetune(
            net, loader(), epochs=1, recipe=recipe.replace(router_lr_factor=factor), progress=False
        )
        after = state(net)
        names = [n for n in after if n.startswith("routers")]
        moved[factor] = sum(float((after[n] - before[n]).abs().sum()) for n in names)
        assert all(not torch.equal(after[n], before[n]) for n in after if n.endswith("conv.weight"))
        assert history.last.lr < recipe.lr  # the rate of all but the routers, whatever the factor
    assert moved[0.0] == 0.0
    assert 0.0 < moved[0.1] < moved[1.0]


def one_step(**changes: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A tree's weights before and after one plain step of SGD."""
    net = tree()
    before = state(net)
    recipe = QUICK.replace(warmup_epochs=0.0, momentum=0.0, nesterov=False, schedule="constant", **changes)
    finetune(net, [samples(16)], epochs=1, recipe=recipe, progress=False)
    return before, state(net)


def test_branches_learn_at_the_rate_of_their_level() -> None:
    """One step of SGD from the same gradients: levels one and two move 2 and 4 times as far."""
    moved = []
    for factor in (1.0, 2.0):
        before, after = one_step(branch_lr_factor=factor, weight_decay=0.0)
        moved.append({name: value - before[name] for name, value in after.items()})
    expected = {
        "backbone": 1.0,
        "routers": 1.0,
        "specializers.0": 2.0,
        "specializers.1_0": 4.0,
        "heads.0_1": 4.0,
    }
    for name, once in moved[0].items():
        part = next((p for p in expected if name.startswith(p + ".")), None)
        if part is not None and name.rsplit(".", 1)[1] in ("weight", "bias"):
            torch.testing.assert_close(moved[1][name], expected[part] * once, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize(("factor", "leaf"), [(1.0, 4.0), (0.5, 1.0)])
def test_branches_decay_by_their_level(factor: float, leaf: float) -> None:
    """What a step takes off the weights: a leaf's four times the rate, times its share of the decay."""
    before, plain = one_step(branch_lr_factor=2.0, branch_weight_decay_factor=factor, weight_decay=0.0)
    _, decayed = one_step(branch_lr_factor=2.0, branch_weight_decay_factor=factor, weight_decay=0.1)
    for part, times in (("backbone", 1.0), ("routers", 1.0), ("heads.0_1", leaf)):
        for name in before:
            if name.startswith(part) and name.endswith("weight"):
                expected = times * QUICK.lr * 0.1 * before[name]
                torch.testing.assert_close(
                    plain[name] - decayed[name], expected, rtol=1e-2, atol=1e-5, msg=name
                )


def test_balance_weight_brings_back_starved_leaves() -> None:
    balances = {}
    for weight in (0.0, 5.0):
        net = tree()
        with torch.no_grad():
            for router in net.routers.values():
                router.linear.bias.copy_(torch.tensor([2.0, 0.0]))
        recipe = QUICK.replace(balance_weight=weight, lr=0.1)
        balances[weight] = finetune(net, loader(), epochs=4, recipe=recipe, progress=False).last.balance
    assert balances[5.0] > balances[0.0]
    assert balances[5.0] > 0.5


def test_soft_labels_and_other_loaders() -> None:
    images, targets = samples()
    soft = nn.functional.one_hot(targets, CLASSES).float() * 0.9 + 0.1 / CLASSES
    nets = [dense(), dense()]
    recipe = QUICK.replace(label_smoothing=0.1)
    hard_batches = [((images[i : i + 16],), targets[i : i + 16].int()) for i in range(0, 96, 16)]
    soft_batches = [[images[i : i + 16], soft[i : i + 16]] for i in range(0, 96, 16)]
    finetune(nets[0], hard_batches, epochs=1, recipe=recipe, progress=False)
    finetune(nets[1], soft_batches, epochs=1, recipe=recipe.replace(label_smoothing=0.0), progress=False)
    for a, b in zip(state(nets[0]).values(), state(nets[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_starving_leaves_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = tree()
    with torch.no_grad():
        for router in net.routers.values():
            router.linear.bias.copy_(torch.tensor([50.0, 0.0]))
    with caplog.at_level(logging.WARNING):
        history = finetune(net, loader(), epochs=2, recipe=QUICK.replace(lr=1e-4), progress=False)
    assert history.last.balance is not None
    assert history.last.balance < 0.5
    warnings = [r.getMessage() for r in caplog.records if "leaves starve" in r.getMessage()]
    assert [f"after epoch {epoch}" in text for epoch, text in zip((1, 2), warnings, strict=True)] == [
        True,
        True,
    ]
    assert "the last (0/0 100.0%" in warnings[1]


def test_the_warm_up_of_a_named_recipe_fits_few_epochs(caplog: pytest.LogCaptureFixture) -> None:
    """Five epochs of a hundred would leave three without any decay: training would end at its highest rate."""
    history = finetune(dense(), loader(), epochs=3, progress=False)
    assert history.last.lr < 0.1 * history.records[0].lr
    assert "warm-up" not in caplog.text
    finetune(dense(), loader(), epochs=1, recipe=QUICK.replace(warmup_epochs=2.0), progress=False)
    assert "a warm-up of 2 epochs leaves none of the 1" in caplog.text


def test_a_rate_for_larger_batches_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    finetune(dense(), loader(), epochs=1, progress=False)
    (record,) = caplog.records
    assert "for batches of 256, and these have 16: in proportion it would be 0.00625" in record.getMessage()
    caplog.clear()
    finetune(
        dense(), loader(), epochs=1, recipe=as_recipe("default").fitted(1).for_batches(16), progress=False
    )
    finetune(dense(), loader(), epochs=1, recipe="modelnet40", progress=False)
    assert not caplog.records


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"device mps:7 cannot be used here .*; try cpu"):
        finetune(dense(), loader(), epochs=1, recipe=QUICK, device="mps:7", progress=False)


def test_frozen_weights_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = dense().requires_grad_(False)
    next(net.parameters()).requires_grad_(True)
    finetune(net, loader(), epochs=1, recipe=QUICK, progress=False)
    assert "parameters do not train: they have requires_grad False" in caplog.text


@pytest.mark.parametrize("library", ["rich", "tqdm", "log"])
def test_progress_with_every_library(
    library: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("rich" if library == "rich" else "tqdm" if library == "tqdm" else "torch")
    import sigmab_plugin.tuning.progress as module

    monkeypatch.setattr(module, "_kind", lambda: library)
    with caplog.at_level(logging.INFO):
        finetune(tree(), loader(), epochs=2, recipe=QUICK, val_loader=loader(32, seed=1))
    printed, shown = capfd.readouterr()
    assert not printed
    shown += caplog.text
    for part in ("epoch 2/2", "loss", "val", "leaves", "balance"):
        assert part in shown


class TestBadInput:
    def test_recipe(self) -> None:
        known = "cifar100, default, imagenet, modelnet40"
        with pytest.raises(ConfigError, match=f"unknown recipe 'imagnet'; known: {known}"):
            finetune(tree(), loader(), recipe="imagnet")

    @pytest.mark.parametrize("epochs", [0, -3])
    def test_epochs(self, epochs: int) -> None:
        with pytest.raises(ConfigError, match=f"epochs must be at least 1; got {epochs}"):
            finetune(tree(), loader(), epochs=epochs)

    def test_more_hard_epochs_than_epochs(self) -> None:
        with pytest.raises(ConfigError, match="hard_epochs 3 are more than the 2 epochs"):
            finetune(tree(), loader(), epochs=2, recipe=QUICK.replace(hard_epochs=3))

    def test_a_dense_network_has_no_backbone_to_freeze(self) -> None:
        with pytest.raises(ConfigError, match="Sequential has no backbone"):
            finetune(dense(), loader(), epochs=1, recipe=QUICK.replace(freeze_backbone=True))

    def test_distillation_without_teacher(self) -> None:
        with pytest.raises(ConfigError, match="there is no teacher"):
            finetune(tree(), loader(), epochs=1, recipe=QUICK.replace(distillation_weight=1.0))

    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            ([], "the training loader is empty"),
            ((batch for batch in [samples(8)]), "has no length"),
            ([samples(8)[0]], "a batch must be \\(inputs, targets\\)"),
            ([(samples(8)[0], samples(8)[1].float())], "targets must be integer class indices"),
            ([(samples(8)[0], samples(8)[1] + 2)], "target 5 is out of range: the network has 4 classes"),
            ([(samples(8)[0], samples(8)[1] - 1)], "target -1 is out of range"),
            ([(samples(8)[0], torch.ones(8, 7))], "soft labels have 7 classes, the network has 4"),
            ([samples(8), (samples(8)[0], samples(8)[1] + 9)], "target 12 is out of range"),
        ],
    )
    @pytest.mark.parametrize("make", [tree, dense])
    def test_loader(self, make: Any, bad: Any, words: str) -> None:
        net = make()
        modes = [module.training for module in net.modules()]
        with pytest.raises(TrainingError, match=words):
            finetune(net, bad, epochs=1, recipe=QUICK, progress=False)
        assert [module.training for module in net.modules()] == modes

    def test_nan_inputs_stop_before_the_weights_change(self) -> None:
        net = tree(norm=False)
        before = state(net)
        images, targets = samples(16)
        images[3] = float("nan")
        with pytest.raises(TrainingError, match="inputs of epoch 1, step 1 hold NaN"):
            finetune(net, [(images, targets)], epochs=1, recipe=QUICK, progress=False)
        assert same(state(net), before)

    def test_divergence_names_the_step_and_the_remedy(self) -> None:
        recipe = QUICK.replace(lr=1e30, warmup_epochs=0.0, schedule="constant")
        with pytest.raises(TrainingError, match=r"epoch 1, step \d+ \(lr 1e\+30\); try a lower lr"):
            finetune(dense(norm=False), loader(), epochs=2, recipe=recipe, progress=False)

    def test_teacher_with_other_classes(self) -> None:
        net = tree(norm=False)
        before = state(net)
        with pytest.raises(TrainingError, match="teacher logits have shape \\(16, 9\\)"):
            finetune(net, loader(), epochs=1, recipe=QUICK, teacher=dense(classes=9), progress=False)
        assert same(state(net), before)

    def test_everything_frozen(self) -> None:
        with pytest.raises(TrainingError, match="no trainable parameter"):
            finetune(tree().requires_grad_(False), loader(), epochs=1)

    def test_outputs_that_are_no_logits(self) -> None:
        with pytest.raises(TrainingError, match="must return logits"):
            finetune(nn.Conv2d(1, 2, 3), loader(), epochs=1, recipe=QUICK, progress=False)

    def test_empty_validation(self) -> None:
        with pytest.raises(TrainingError, match="evaluation loader is empty"):
            finetune(tree(), loader(), epochs=1, recipe=QUICK, val_loader=[], progress=False)


class TestBadCheckpoint:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        finetune(tree(), loader(), epochs=1, recipe=QUICK, checkpoint_dir=tmp_path, progress=False)
        return tmp_path

    def resume(self, net: nn.Module, folder: Path, **changes: Any) -> None:
        options = {"epochs": 1, "recipe": QUICK, "progress": False, "checkpoint_dir": folder, **changes}
        finetune(net, loader(), **options)

    def test_truncated(self, folder: Path) -> None:
        path = folder / "last.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(FormatError, match="truncated or not a safetensors file"):
            self.resume(tree(), folder)

    def test_empty(self, folder: Path) -> None:
        (folder / "last.safetensors").write_bytes(b"")
        with pytest.raises(FormatError, match="truncated or not a safetensors file"):
            self.resume(tree(), folder)

    def test_another_network(self, folder: Path) -> None:
        net = tree(classes=7)
        before = state(net)
        with pytest.raises(FormatError, match=r"tensor 'heads.0_0.2.weight' is torch.float32 \(4, 6\)"):
            self.resume(net, folder)
        assert same(state(net), before)
        with pytest.raises(FormatError, match=r"has no tensor '0\.0\.weight'"):
            self.resume(dense(), folder)

    def test_other_parameters_frozen(self, folder: Path) -> None:
        net = tree()
        net.backbone.requires_grad_(False)
        with pytest.raises(FormatError, match="optimiser state"):
            self.resume(net, folder)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"recipe": QUICK.replace(lr=0.3)}, "lr 0.05 -> 0.3"),
            ({"epochs": 2}, "epochs 1 -> 2"),
            ({"seed": 3}, "seed 0 -> 3"),
        ],
    )
    def test_another_run(self, folder: Path, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(FormatError, match=words):
            self.resume(tree(), folder, **changes)

    def test_full_disk_keeps_the_old_file(self, folder: Path) -> None:
        resource = pytest.importorskip("resource")
        before = (folder / "last.safetensors").read_bytes()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match=r"could not write .*last\.safetensors"):
                self.resume(tree(), folder, resume=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert (folder / "last.safetensors").read_bytes() == before
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]

    def test_starting_over(self, folder: Path) -> None:
        net = tree()
        self.resume(net, folder, resume=False, seed=3)
        fresh = tree()
        finetune(fresh, loader(), epochs=1, recipe=QUICK, seed=3, progress=False)
        assert same(state(net), state(fresh))


def test_published_recipes() -> None:
    imagenet, cifar, points = (TrainRecipe.published(n) for n in ("imagenet", "cifar100", "modelnet40"))
    for recipe, epochs in ((imagenet, 100), (cifar, 60)):
        assert (recipe.optimizer, recipe.nesterov, recipe.lr, recipe.weight_decay) == ("sgd", True, 0.1, 1e-4)
        assert (recipe.schedule, recipe.warmup_epochs, recipe.epochs) == ("cosine", 5, epochs)
        assert (recipe.batch_size, recipe.label_smoothing) == (256, 0.1)
    assert (points.optimizer, points.lr, points.weight_decay, points.epochs) == ("adam", 1e-3, 1e-4, 200)
    assert (points.schedule, points.step_gamma, points.step_epochs) == ("step", 0.7, 20)
    assert (points.batch_size, points.label_smoothing, points.warmup_epochs) == (32, 0.0, 0.0)
    for recipe in (imagenet, cifar, points):
        assert TrainRecipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_default_recipe_is_the_papers_with_rates_by_level() -> None:
    """What a call without ``recipe`` does is what ``"default"`` does, and not what ``"imagenet"`` does."""
    weights = []
    for options in ({}, {"recipe": "default"}, {"recipe": "imagenet"}):
        net = tree()
        finetune(net, loader(), epochs=1, progress=False, **options)
        weights.append(state(net))
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])
    plain = as_recipe("default").replace(branch_lr_factor=1.0, branch_weight_decay_factor=1.0)
    assert plain == as_recipe("imagenet")


def test_workers_see_the_same_data() -> None:
    """Augmentation in worker processes draws from seeds that follow (seed, epoch)."""
    nets = [dense(), dense()]
    for net in nets:
        noisy = DataLoader(_Noisy(*samples(32)), batch_size=16, shuffle=True, num_workers=1)
        finetune(net, noisy, epochs=2, recipe=QUICK, progress=False)
    assert same(state(nets[0]), state(nets[1]))


class _Noisy(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, target = super().__getitem__(index)
        return image + 0.1 * torch.randn_like(image), target
