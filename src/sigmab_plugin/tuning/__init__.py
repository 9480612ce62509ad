"""Fine-tuning: losses, the training loop, evaluation, BatchNorm re-estimation, and the collectives they use."""

from .batchnorm import reestimate_batchnorm
from .checkpoint import load_weights
from .evaluation import Evaluation, balance, evaluate
from .history import EpochRecord, History
from .loop import finetune
from .losses import soft_routing_loss
from .recipe import TrainRecipe, as_recipe

__all__ = [
    "EpochRecord",
    "Evaluation",
    "History",
    "TrainRecipe",
    "as_recipe",
    "balance",
    "evaluate",
    "finetune",
    "load_weights",
    "reestimate_batchnorm",
    "soft_routing_loss",
]
