"""Ten ways to take one sparsity per layer from its range."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError
from .config import STRATEGIES
from .ranges import LayerRange


def layer_sparsities(ranges: Sequence[LayerRange], strategy: str) -> dict[str, float]:
    """Sparsity of every weight tensor under ``strategy``, by parameter name.

    ``min``, ``max``, ``midpoint`` and ``alpha_<a>`` stand at one place of every range (``midpoint`` is
    ``alpha_0.5`` by another name). ``parameter_proportional`` stands at beta = min(1, 0.1 |W_l| / mean |W|),
    |W| the number of weights of a prunable layer. ``classifier_heavy`` takes the largest sparsity in the
    classifier and the least elsewhere; ``feature_heavy`` the least in the classifier and the largest
    elsewhere.

    Raises:
        ConfigError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}; known: {', '.join(STRATEGIES)}")
    prunable = [layer.parameters for layer in ranges if layer.role != "normalization"]
    mean = sum(prunable) / len(prunable)
    return {layer.name: _between(layer, _place(layer, strategy, mean)) for layer in ranges}


def _place(layer: LayerRange, strategy: str, mean_parameters: float) -> float:
    """Where in its range the layer stands, 0 = least sparsity, 1 = largest."""
    if strategy.startswith("alpha_"):
        return float(strategy.removeprefix("alpha_"))
    if strategy == "parameter_proportional":
        return min(1.0, 0.1 * layer.parameters / mean_parameters)
    classifier = layer.role == "classifier"
    places = {"min": 0.0, "max": 1.0, "midpoint": 0.5}
    return places.get(strategy, float(classifier == (strategy == "classifier_heavy")))


def _between(layer: LayerRange, place: float) -> float:
    return layer.minimum + place * (layer.maximum - layer.minimum)
