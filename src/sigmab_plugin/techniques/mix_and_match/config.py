"""The ``mix_and_match`` section of a config file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import TechniqueConfig, option
from ...errors import ConfigError

#: What a sparsity range is observed with, at every global sparsity.
CRITERIA = ("magnitude", "snip", "grasp")
#: What is dropped within a layer: the lowest |w|, |dL/dw| or |w dL/dw|.
SCORES = ("magnitude", "gradient", "combined")
STRATEGIES = (
    "min",
    "max",
    "midpoint",
    "alpha_0.3",
    "alpha_0.5",
    "alpha_0.7",
    "alpha_0.9",
    "parameter_proportional",
    "classifier_heavy",
    "feature_heavy",
)
ROLES = ("normalization", "patch_embedding", "embedding", "attention", "router", "classifier", "feature")
#: Least and largest sparsity by role, where ``role_limits`` says nothing else.
ROLE_LIMITS = {
    "normalization": (0.0, 0.0),
    "embedding": (0.0, 0.0),
    "router": (0.0, 0.0),
    "patch_embedding": (0.15, 0.30),
}


@dataclass(frozen=True)
class MixAndMatchConfig(TechniqueConfig):
    """Mix-and-Match section (arXiv 2603.20280): per-layer sparsity ranges, ten strategies, three scores."""

    algorithm: ClassVar[str] = "mix_and_match"

    sparsities: tuple[float, ...] = option((0.7, 0.8, 0.9), "global sparsities that ranges are observed at")
    criteria: tuple[str, ...] = option(CRITERIA, "criteria that ranges are observed with")
    scores: tuple[str, ...] = option(SCORES, "scores tried, one search over the strategies each")
    strategies: tuple[str, ...] = option(STRATEGIES, "strategies tried")
    calibration_share: float = option(
        0.1,
        "share of the training batches used for ranges and scores where no calibration data is given",
        exclusiveMinimum=0.0,
        maximum=1.0,
    )
    role_limits: dict[str, tuple[float, ...]] = option(
        ROLE_LIMITS,
        "least and largest sparsity of a role's layers; roles that are not named keep theirs",
    )
    small_layer_parameters: int = option(10_000, "layers with fewer parameters are small", minimum=0)
    small_layer_sparsity: float = option(0.1, "largest sparsity of a small layer", minimum=0.0, maximum=1.0)
    maximum_sparsity: float = option(
        0.99, "largest sparsity of any layer, so that none is cut through", minimum=0.0, maximum=1.0
    )
    roles: dict[str, str] = option({}, "role by shell pattern of module names, before what is found")
    ignored_layers: tuple[str, ...] = option((), "shell patterns of module names left dense")
    max_drop: float | None = option(
        None,
        "choose the sparsest run that loses at most this on validation; None: the best score",
        minimum=0.0,
    )
    finetune_epochs: int = option(5, "epochs of masked fine-tuning of each run", minimum=0)
    finetune_lr: float = option(0.01, "learning rate of fine-tuning, cosine to 0", exclusiveMinimum=0.0)
    momentum: float = option(0.9, "momentum of fine-tuning with sgd", minimum=0.0, exclusiveMaximum=1.0)
    weight_decay: float = option(5e-4, "weight decay of fine-tuning", minimum=0.0)
    optimizer: str = option("sgd", "optimiser of fine-tuning", enum=("sgd", "adamw"))
    structured_match: str = option(
        "channels",
        "structured output: a layer's sparsity as its channel ratio, or as its share of parameters",
        enum=("channels", "parameters"),
    )
    workers: int = option(
        1,
        "runs at a time (threads); 0: one for every core that the process may use; with more than one, dropout is not "
        "reproducible",
        minimum=0,
    )
    seed: int = option(0, "seed of every run's fine-tuning", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "role_limits", {**ROLE_LIMITS, **self.role_limits})

    def validate(self) -> None:
        for key, values, known in (
            ("criteria", self.criteria, CRITERIA),
            ("scores", self.scores, SCORES),
            ("strategies", self.strategies, STRATEGIES),
            ("roles", tuple(self.roles.values()), ROLES),
            ("role_limits", tuple(self.role_limits), ROLES),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ConfigError(f"mix_and_match: {key}: {unknown[0]!r} is not one of {', '.join(known)}")
        for key in ("criteria", "scores", "strategies", "sparsities"):
            if not getattr(self, key):
                raise ConfigError(f"mix_and_match: {key} is empty; name at least one")
        if not all(0 < sparsity < 1 for sparsity in self.sparsities):
            raise ConfigError(
                f"mix_and_match: sparsities must lie between 0 and 1; got {list(self.sparsities)}"
            )
        for role, limits in self.role_limits.items():
            if len(limits) != 2 or not 0 <= limits[0] <= limits[1] <= 1:
                raise ConfigError(
                    f"mix_and_match: role_limits: {role!r} needs [least, largest] within [0, 1]; got {list(limits)}"
                )
