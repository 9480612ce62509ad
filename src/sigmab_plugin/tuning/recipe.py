"""How to train: one frozen, JSON-serialisable record; the default and the three published recipes by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..config import TechniqueConfig, option
from ..errors import ConfigError


@dataclass(frozen=True)
class TrainRecipe(TechniqueConfig):
    """Optimiser, schedule and regularisation of one training run.

    Defaults are the paper's ImageNet recipe (arXiv 2606.09924). Rates are for a *global* batch of
    ``batch_size`` samples; the loader decides what the batch is, and nothing is rescaled behind your back.
    """

    algorithm: ClassVar[str] = "train"

    optimizer: str = option("sgd", "optimiser", enum=("sgd", "adam", "adamw"))
    lr: float = option(0.1, "peak learning rate, for a global batch of batch_size", exclusiveMinimum=0.0)
    weight_decay: float = option(1e-4, "L2 penalty (sgd, adam) or decoupled decay (adamw)", minimum=0.0)
    momentum: float = option(0.9, "momentum of sgd", minimum=0.0, exclusiveMaximum=1.0)
    nesterov: bool = option(True, "Nesterov momentum, for sgd")
    batch_size: int = option(256, "global batch that lr is meant for", minimum=1)
    epochs: int = option(100, "epochs where the call gives none", minimum=1)
    schedule: str = option("cosine", "learning rate after warm-up", enum=("cosine", "step", "constant"))
    warmup_epochs: float = option(5.0, "linear warm-up, per iteration", minimum=0.0)
    step_epochs: int = option(20, "epochs between decays, for schedule step", minimum=1)
    step_gamma: float = option(
        0.7, "factor of one decay, for schedule step", exclusiveMinimum=0.0, maximum=1.0
    )
    label_smoothing: float = option(0.1, "of the classification loss", minimum=0.0, exclusiveMaximum=1.0)
    grad_clip: float | None = option(None, "largest gradient norm; null: no clipping", exclusiveMinimum=0.0)
    amp: bool = option(False, "bf16 autocast in forward passes")
    distillation_weight: float = option(0.0, "weight of the teacher term; needs a teacher", minimum=0.0)
    distillation_temperature: float = option(2.0, "softening of the teacher term", exclusiveMinimum=0.0)
    bn_reestimation: bool = option(False, "re-estimate BatchNorm statistics after the last epoch")
    freeze_backbone: bool = option(
        False,
        "train only what lies behind the backbone, whose weights and BatchNorm statistics stay (trees, twins)",
    )
    hard_epochs: int = option(0, "last epochs with straight-through hard routing (trees only)", minimum=0)
    router_temperature: float = option(
        1.0, "first epoch's extra softening of the router, annealed geometrically to 1", exclusiveMinimum=0.0
    )
    router_lr_factor: float = option(
        1.0,
        "routers learn at lr times this; 0: they stay as restructuring made them (trees only)",
        minimum=0.0,
    )
    branch_lr_factor: float = option(
        1.0,
        "a branch at level n learns at lr times this to the power n (trees only); with sgd 2 makes up for "
        "gradients that are weighted with the branch's share of the samples",
        exclusiveMinimum=0.0,
    )
    branch_weight_decay_factor: float = option(
        1.0,
        "a branch at level n has weight_decay times this to the power n (trees only); with sgd and a branch_lr_factor "
        "of 2, 0.5 keeps the decay of a step as it is",
        minimum=0.0,
    )
    balance_weight: float = option(
        0.0, "weight of the term that draws the leaves towards equal shares (trees only)", minimum=0.0
    )

    def validate(self) -> None:
        """Check what one option alone cannot tell."""
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise ConfigError("train: nesterov needs momentum; set momentum or nesterov=False")
        if self.freeze_backbone and self.bn_reestimation:
            raise ConfigError(
                "train: freeze_backbone keeps the backbone's BatchNorm statistics and bn_reestimation renews them; "
                "choose one"
            )

    def fitted(self, epochs: int) -> TrainRecipe:
        """With a warm-up of at most a tenth of a run of ``epochs``, which may be fewer than the recipe was made for."""
        return self.replace(warmup_epochs=min(self.warmup_epochs, _WARMUP_SHARE * epochs))

    def for_batches(self, size: int) -> TrainRecipe:
        """With sgd's rate in proportion to batches of ``size`` (the linear rule of Goyal et al., arXiv 1706.02677).

        Trees want it more than other networks: at a rate that is too high the routers send all samples to one leaf.
        """
        if self.optimizer != "sgd":
            return self
        return self.replace(lr=self.lr * size / self.batch_size, batch_size=size)

    @classmethod
    def published(cls, name: str) -> TrainRecipe:
        """The paper's fine-tuning recipe for ``"imagenet"``, ``"cifar100"`` or ``"modelnet40"``.

        Raises:
            ConfigError: any other name.
        """
        return _lookup(name, _PUBLISHED)


#: Share of the epochs that the warm-up of a recipe that was made for other runs takes at most.
_WARMUP_SHARE = 0.1
#: Name of the recipe that is used where none is asked for.
DEFAULT = "default"

_PUBLISHED = {
    "imagenet": TrainRecipe(),
    "cifar100": TrainRecipe(epochs=60),
    "modelnet40": TrainRecipe(
        optimizer="adam",
        lr=1e-3,
        batch_size=32,
        epochs=200,
        schedule="step",
        warmup_epochs=0.0,
        label_smoothing=0.0,
    ),
}

#: The default is the paper's recipe for ImageNet with rates and weight decay by level, which did better than the same
#: for all levels on CIFAR-100 (``benchmarks/README.md``).
_NAMED = {DEFAULT: TrainRecipe(branch_lr_factor=2.0, branch_weight_decay_factor=0.5), **_PUBLISHED}


def as_recipe(recipe: str | TrainRecipe) -> TrainRecipe:
    """A recipe, or ``"default"``, or a published one by its name.

    Raises:
        ConfigError: any other name.
    """
    return _lookup(recipe, _NAMED) if isinstance(recipe, str) else recipe


def _lookup(name: str, recipes: dict[str, TrainRecipe]) -> TrainRecipe:
    if name not in recipes:
        raise ConfigError(f"unknown recipe {name!r}; known: {', '.join(sorted(recipes))}")
    return recipes[name]
