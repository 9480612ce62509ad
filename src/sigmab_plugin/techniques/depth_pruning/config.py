"""The ``depth_pruning`` section of a config file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import TechniqueConfig, option
from ...errors import ConfigError


@dataclass(frozen=True)
class DepthPruningConfig(TechniqueConfig):
    """Depth pruning with an auxiliary network (arXiv 2204.10546). The defaults are the paper's."""

    algorithm: ClassVar[str] = "depth_pruning"

    cut: str = option("", "last layer or block that is kept; empty: sweep all cuts and choose by max_drop")
    max_drop: float = option(
        0.01,
        "without cut: the smallest network whose score is at most this much below the model's",
        minimum=0.0,
    )
    granularity: str = option(
        "block", "cuts that a sweep tries: after every block, or after every layer", enum=("block", "layer")
    )
    head_widths: tuple[int, ...] = option(
        (32, 16), "output channels of the auxiliary head's separable stages"
    )
    num_classes: int | None = option(None, "outputs of the head; None: as many as the model has", minimum=1)
    freeze: bool = option(True, "train the auxiliary head alone; the kept layers and their statistics stay")
    cache_features: bool = option(
        False, "with freeze: run the kept layers once; right only where the data is the same in every epoch"
    )
    epochs: tuple[int, ...] = option((20, 10, 20), "epochs of each training stage")
    learning_rates: tuple[float, ...] = option((1e-3, 5e-4, 2.5e-4), "Adam's learning rate in each stage")
    latency_repeats: int = option(30, "timed runs per network in a sweep; the median counts", minimum=1)
    seed: int = option(0, "seed of the head's weights, of the order of the data and of dropout", minimum=0)

    def validate(self) -> None:
        if any(width < 1 for width in self.head_widths):
            raise ConfigError(f"depth_pruning: head_widths must be positive; got {list(self.head_widths)}")
        if len(self.epochs) != len(self.learning_rates):
            raise ConfigError(
                f"depth_pruning: {len(self.epochs)} stages in epochs but {len(self.learning_rates)} "
                "in learning_rates; give one of each per stage"
            )
        if any(count < 0 for count in self.epochs) or any(rate <= 0 for rate in self.learning_rates):
            raise ConfigError(
                "depth_pruning: epochs must not be negative and learning_rates must be positive"
            )
        if self.cache_features and not self.freeze:
            raise ConfigError("depth_pruning: cache_features needs freeze, or the cached features go stale")
