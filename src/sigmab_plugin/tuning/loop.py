"""The fine-tuning loop: one for trees, dense networks and static twins, so that comparisons are fair."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..counting import as_arguments
from ..errors import TrainingError
from . import checkpoint
from .batches import check_targets, split_batch, to_device
from .batchnorm import reestimate_batchnorm
from .distributed import all_reduce_sum, barrier, broadcast_object, is_distributed, is_main, rank, world_size
from .evaluation import Evaluation, balance, evaluate, module_device
from .finite import FiniteLoss
from .history import EpochRecord, History, best_epoch
from .identity import check_identity, started_from
from .lone_sample import has_lone_sample, lone_sample_refused
from .objective import Objective, leaf_names
from .optimizer import build_optimizer
from .progress import Progress
from .recipe import DEFAULT, TrainRecipe
from .schedule import learning_rate, router_temperature
from .scopes import backbone_of, frozen, left_as_found, synchronised
from .seeding import loader_left_as_found, preserve_random_state, seed_epoch
from .settings import settings_of, usable

logger = logging.getLogger(__name__)

#: Balance under which leaves count as starved.
STARVED = 0.5


def finetune(
    net: nn.Module,
    train_loader: Any,
    *,
    epochs: int | None = None,
    recipe: str | TrainRecipe = DEFAULT,
    val_loader: Any = None,
    teacher: nn.Module | None = None,
    device: torch.device | str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
    max_seconds: float | None = None,
    sync_batchnorm: bool = False,
) -> History:
    """Train ``net`` in place: a tree with soft routing (eq. 8), any other module with cross-entropy.

    The network keeps the mode (train or eval) and the gradients it had, and frozen parameters stay frozen. Under an
    initialised process group gradients and metrics are averaged over ranks; each rank's loader brings its
    part (``DistributedSampler``), rank 0 writes the files.

    Args:
        net: a tree, or a module whose output is logits (B, C).
        train_loader: has a length and can be read again; yields (inputs, targets) or torch-geometric batches
            with ``y``. Data order is a function of (seed, epoch), see :func:`.seeding.seed_epoch`; a
            :class:`~sigmab_plugin.data.Loader` goes by its own seed instead of this one.
        epochs: total number, those of an earlier, resumed call included; by default the recipe's.
        recipe: ``"default"``, a published one (``"imagenet"``, ``"cifar100"``, ``"modelnet40"``) or a
            :class:`TrainRecipe`. The warm-up of a recipe that is named takes a tenth of the epochs at most.
        val_loader: evaluated after each epoch, trees in hard routing; decides which epoch is best.
        teacher: dense network whose logits are distilled into every leaf, with the recipe's weight, or 1
            where the recipe has none. Moved to ``device`` for the run and put back.
        device: where to train; ``net`` stays there. By default the device of its first parameter.
        checkpoint_dir: folder of ``last.safetensors`` and ``best.safetensors``.
        resume: go on from ``last.safetensors`` if it is there; on CPU the result equals that of a run that
            was never stopped. Give the network as it was given at first, or as the run left it.
        log: path of the CSV and JSON log, to which ``.csv`` and ``.json`` are appended; by default ``log`` in
            ``checkpoint_dir``.
        progress: show a progress bar on standard error.
        seed: of dropout, and of the order and augmentation that a DataLoader or the global generators decide.
            The package's own Loader has a seed of its own: give both the same to vary all with one number.
        max_seconds: stop after the epoch that leaves too little time for another; call again to go on.
        sync_batchnorm: BatchNorm statistics over all ranks while training (CUDA).

    Returns:
        Losses, accuracies and leaf shares by epoch.

    Raises:
        ConfigError: options that contradict each other.
        TrainingError: empty or one-shot loader, targets that do not fit, a loss that is not finite, a batch of
            one sample before BatchNorm.
        FormatError: the checkpoint is damaged or belongs to another run: other settings, another network, other
            weights at its start, another teacher, other data.
    """
    used, total = settings_of(net, recipe, epochs, teacher, train_loader)
    fixed = backbone_of(net) if used.freeze_backbone else None
    with (
        preserve_random_state(),
        loader_left_as_found(train_loader),
        left_as_found(net, teacher),
        synchronised(net, sync_batchnorm),
        frozen(fixed),
    ):
        run = _Run(
            net,
            train_loader,
            recipe=used,
            epochs=total,
            val_loader=val_loader,
            teacher=teacher,
            device=usable(device) if device is not None else module_device(net),
            folder=None if checkpoint_dir is None else Path(checkpoint_dir),
            log=_log_stem(log, checkpoint_dir),
            seed=seed,
        )
        return run.train(resume=resume, progress=progress and is_main(), max_seconds=max_seconds)


def _log_stem(
    log: str | os.PathLike[str] | None, checkpoint_dir: str | os.PathLike[str] | None
) -> Path | None:
    if log is not None:
        return Path(log)
    return None if checkpoint_dir is None else Path(checkpoint_dir) / "log"


class _Run:
    """One call of :func:`finetune`."""

    def __init__(
        self,
        net: nn.Module,
        loader: Any,
        *,
        recipe: TrainRecipe,
        epochs: int,
        val_loader: Any,
        teacher: nn.Module | None,
        device: torch.device,
        folder: Path | None,
        log: Path | None,
        seed: int,
    ) -> None:
        self.net, self.loader, self.recipe, self.epochs = net.to(device), loader, recipe, epochs
        self.val_loader, self.device, self.folder, self.log, self.seed = val_loader, device, folder, log, seed
        self.teacher = None if teacher is None else teacher.to(device).eval()
        self.steps = _length(loader)
        _warn_unless_sharded(loader)
        self.leaves = leaf_names(net)
        self.records: list[EpochRecord] = []
        self.optimizer = build_optimizer(net, recipe)
        self.objective = Objective(net, recipe)
        self.starved = False
        self.lr = recipe.lr
        self.lone_sample = has_lone_sample(loader)
        self.identity: dict[str, Any] = {}

    def train(self, *, resume: bool, progress: bool, max_seconds: float | None) -> History:
        started = time.perf_counter()
        if self.folder is not None:
            self.identity = self._identity()
        if resume:
            self._resume()
        model = DistributedDataParallel(self.objective) if is_distributed() else self.objective
        complete = True
        with Progress(enabled=progress, epochs=self.epochs) as bar:
            for epoch in range(len(self.records), self.epochs):
                record, evaluation = self._epoch(model, epoch, bar)
                self.records.append(record)
                bar.finish_epoch(record)
                self._save(evaluation)
                self._warn_if_starved(record)
                spent = time.perf_counter() - started
                short = max_seconds is not None and spent + record.seconds > max_seconds
                if epoch + 1 < self.epochs and broadcast_object(short):
                    complete = False
                    break
        return self._history(complete)

    def _epoch(self, model: nn.Module, epoch: int, bar: Progress) -> tuple[EpochRecord, Evaluation | None]:
        started = time.perf_counter()
        seed_epoch(self.loader, seed=self.seed, epoch=epoch, rank=rank())
        self.net.train()
        if self.recipe.freeze_backbone:
            backbone_of(self.net).eval()
        self.objective.straight_through = epoch >= self.epochs - self.recipe.hard_epochs
        self.objective.router_temperature = router_temperature(self.recipe, epoch, epochs=self.epochs)
        bar.start_epoch(epoch + 1, self.steps)
        totals = all_reduce_sum(self._steps(model, epoch, bar)).tolist()
        loss, samples, correct, *routed = totals
        if epoch + 1 == self.epochs and self.recipe.bn_reestimation:
            reestimate_batchnorm(self.net, self.loader, device=self.device, seed=self.seed)
        evaluation = None
        if self.val_loader is not None:
            evaluation = evaluate(self.net, self.val_loader, device=self.device, amp=self.recipe.amp)
        shares = evaluation.leaf_shares if evaluation else tuple(count / samples for count in routed)
        record = EpochRecord(
            epoch=epoch + 1,
            lr=self.lr,
            train_loss=loss / samples,
            train_accuracy=correct / samples,
            val_loss=evaluation.loss if evaluation else None,
            val_accuracy=evaluation.accuracy if evaluation else None,
            val_mean_class_accuracy=evaluation.mean_class_accuracy if evaluation else None,
            leaf_shares=shares,
            balance=balance(shares) if shares else None,
            seconds=time.perf_counter() - started,
            samples=int(samples),
        )
        return record, evaluation

    def _steps(self, model: nn.Module, epoch: int, bar: Progress) -> Tensor:
        """Train over the loader once; (3 + K,) sums of loss, samples, correct ones, samples per leaf."""
        recipe, device = self.recipe, self.device
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        totals = torch.zeros(3 + len(self.leaves), dtype=torch.float64, device=device)
        guard = FiniteLoss(epoch=epoch + 1, device=device)
        shown = time.perf_counter()
        done = 0
        for step, batch in enumerate(self.loader):
            inputs, targets = split_batch(batch)
            if self.objective.classes is not None and not targets.is_cuda:
                check_targets(targets, self.objective.classes)
            inputs, targets = to_device(inputs, device), targets.to(device, non_blocking=True)
            lr = self.lr = self._set_learning_rate(epoch * self.steps + step)
            with (
                torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp),
                lone_sample_refused(self.net, len(targets), ahead=self.lone_sample and not done),
            ):
                loss, counts = model(inputs, targets, self._teach(inputs))
            guard.check(loss, step=step, lr=lr, inputs=inputs)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if recipe.grad_clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.grad_clip)
            self.optimizer.step()
            totals[0] += loss.detach() * len(targets)
            totals[1:] += counts
            done += 1
            text = None
            if bar.shows_steps and time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                text = _running(totals)
            bar.step(text)
        if not done:
            raise TrainingError(
                f"the training loader has length {self.steps} and yielded no batch; it cannot be re-read"
            )
        guard.finish()
        return totals

    def _teach(self, inputs: Any) -> Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            logits: Tensor = self.teacher(*as_arguments(inputs))
        return logits

    def _set_learning_rate(self, step: int) -> float:
        lr = learning_rate(self.recipe, step, steps_per_epoch=self.steps, epochs=self.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        return lr

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued; the main process's, whose weights count."""
        origin = started_from(self.net, self.teacher, self.loader, seed=self.seed) if is_main() else {}
        return {
            "recipe": self.recipe.to_dict(),
            "epochs": self.epochs,
            "seed": self.seed,
            "steps_per_epoch": self.steps,
            **broadcast_object(origin),
        }

    def _resume(self) -> None:
        path = None if self.folder is None else self.folder / checkpoint.LAST
        if path is None or not broadcast_object(path.exists()):
            return
        found = checkpoint.read_scalars(path).get("run", {})
        self.identity = check_identity(path, found, self.identity, self.net)
        scalars = checkpoint.load_training(path, self.net, self.optimizer)
        self.records = [EpochRecord.from_dict(record) for record in scalars["records"]]
        logger.info("resuming from %s after epoch %d", path, len(self.records))
        if self.log is not None and is_main():  # the run may have died between checkpoint and log
            self._history(complete=len(self.records) == self.epochs).write(self.log)

    def _save(self, evaluation: Evaluation | None) -> None:
        history = self._history(complete=len(self.records) == self.epochs)
        if is_main():
            if self.folder is not None:
                records = history.to_dict()["records"]
                if evaluation is not None and history.best_epoch == len(self.records):
                    best = {"epoch": history.best_epoch, "val_accuracy": evaluation.accuracy}
                    checkpoint.save_weights(self.folder / checkpoint.BEST, self.net, best)
                scalars = {"run": self.identity, "records": records}
                checkpoint.save_training(self.folder / checkpoint.LAST, self.net, self.optimizer, scalars)
            if self.log is not None:
                history.write(self.log)
        barrier()

    def _history(self, complete: bool) -> History:
        records = tuple(self.records)
        return History(records=records, leaves=self.leaves, best_epoch=best_epoch(records), complete=complete)

    def _warn_if_starved(self, record: EpochRecord) -> None:
        """When it begins, and where training ends with it."""
        starved = record.balance is not None and record.balance < STARVED
        last = record.epoch == self.epochs
        if starved and (last or not self.starved) and is_main():
            shares = ", ".join(
                f"{leaf} {share:.1%}" for leaf, share in zip(self.leaves, record.leaf_shares, strict=True)
            )
            logger.warning(
                "leaves starve: balance %.2f after epoch %d%s (%s); try a lower lr, or in the recipe a balance_weight "
                "or a router_temperature above 1, or a larger responsibility_weight of the tree",
                record.balance,
                record.epoch,
                ", the last" if last else "",
                shares,
            )
        self.starved = starved


def _running(totals: Tensor) -> str:
    loss, samples, correct, *routed = totals.tolist()
    text = f"loss {loss / samples:.4f}  acc {correct / samples:.2%}"
    if routed:
        shares = [count / samples for count in routed]
        text += "  leaves " + "/".join(f"{100 * s:.0f}" for s in shares) + f"  balance {balance(shares):.2f}"
    return text


def _length(loader: Any) -> int:
    try:
        steps = len(loader)
    except TypeError as error:
        raise TrainingError(
            "the training loader has no length; a generator can be read once only: give a DataLoader or a list of "
            "batches"
        ) from error
    if steps < 1:
        raise TrainingError("the training loader is empty; check the data set, the batch size and drop_last")
    return steps


def _warn_unless_sharded(loader: Any) -> None:
    """A DataLoader without a distributed sampler gives every rank all of the data."""
    if world_size() == 1 or not isinstance(loader, torch.utils.data.DataLoader):
        return
    if not any(hasattr(sampler, "num_replicas") for sampler in (loader.sampler, loader.batch_sampler)):
        logger.warning(
            "the training loader has no DistributedSampler: each of the %d processes trains on all of the data",
            world_size(),
        )
