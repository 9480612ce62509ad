"""The ``legonet`` section of a config file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import TechniqueConfig, option


@dataclass(frozen=True)
class LegoNetConfig(TechniqueConfig):
    """LegoNet section (arXiv 2603.06606): one codebook of b x b blocks for all weights of a model.

    The published recipe is the default: 4 x 4 blocks, no scale, no data, no retraining. ``scale``,
    ``reestimate_batchnorm`` and ``finetune_epochs`` are additions, off unless asked for.
    """

    algorithm: ClassVar[str] = "legonet"

    block_size: int = option(4, "side b of the square blocks", minimum=1)
    codebook_size: int = option(32, "number K of blocks in the codebook", minimum=1)
    scale: str = option(
        "none", "divide weights by their root mean square before clustering", enum=("none", "layer", "row")
    )
    ignored_layers: tuple[str, ...] = option((), "shell patterns of module or parameter names left dense")
    iterations: int = option(25, "passes at most of the k-means mini-batch phase", minimum=1)
    tolerance: float = option(
        1e-4, "stop when a pass lowers the distortion by less than this share", minimum=0.0
    )
    sample: int | None = option(
        None, "blocks of the mini-batch phase; by default 512 per centroid, at least 65 536", minimum=1
    )
    full_passes: int = option(1, "passes over all blocks after the mini-batch phase", minimum=0)
    reestimate_batchnorm: bool = option(False, "re-estimate BatchNorm statistics on the calibration data")
    finetune_epochs: int = option(0, "epochs of codebook fine-tuning on the training data", minimum=0)
    finetune_lr: float = option(0.1, "Adam's step as a share of the codebook's RMS", exclusiveMinimum=0.0)
    finetune_dense: bool = option(True, "fine-tune what is stored dense (biases, normalisation) as well")
    finetune_assignments: bool = option(
        False, "straight-through: latent weights train too, blocks change codebook entry"
    )
    seed: int = option(0, "seed of the sample and of k-means++", minimum=0)
