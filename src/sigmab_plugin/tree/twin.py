"""The static twin: one path of the same shape, without routers. The control beside every SigmaB figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..channels import slice_module
from ..config import SigmaBConfig
from ..modes import evaluating
from ..tuning.distributed import all_reduce_sum
from .allocation import top_channels
from .calibration import Calibration
from .inner import InnerActivations
from .plan import paths_at, prefixes
from .prepare import Prepared, channel_means, prepare
from .repair import fit_layers, sample_pairs
from .segments import call


class StaticTwin(nn.Module):
    """Backbone, one specializer per level and a head, in a row; inputs and outputs as the dense model's."""

    def __init__(self, segments: list[nn.Module]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    @property
    def backbone(self) -> nn.Module:
        """What the tree shares over all paths."""
        return self.segments[0]

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) and not named:
            inputs = tuple(inputs[0])
        value = self.segments[0](*inputs, **named)
        for segment in self.segments[1:]:
            value = call(segment, value)
        logits: torch.Tensor = value
        return logits


def static_twin(
    model: nn.Module,
    example_inputs: Any,
    *,
    config: SigmaBConfig,
    calibration_data: Iterable[Any],
    **options: Any,
) -> StaticTwin:
    """One path of the same shape as SigmaB's, without routers: the control at equal active parameters.

    Output channels are those of largest mean activation over all data; inner ones are chosen as in
    SigmaB's branches: by norm, or by mean activation with ``inner_selection="activation"``. Where
    branches differ in width, the largest leaf's widths are taken. ``repair`` works as in the tree, on all samples.

    Args:
        options: tracing options, as in :func:`sigmab_plugin.tree.prepare.prepare`.

    Raises:
        ConfigError, ModelError, CalibrationError: as for ``SigmaBPruner``.
    """
    return build_twin(prepare(model, example_inputs, config=config, **options), calibration_data)


def build_twin(prepared: Prepared, calibration_data: Iterable[Any] | None) -> StaticTwin:
    """One path with the widths of the largest leaf; output channels by their mean activation over all data."""
    calibration = Calibration(calibration_data, prepared.example)
    segments = prepared.segments
    by_activation = prepared.config.inner_selection == "activation"
    recorders = [
        InnerActivations(
            block, level, [g for g in prepared.owned(level) if by_activation and not g.is_output()]
        )
        for level, block in enumerate(segments.levels)
    ]
    with evaluating(segments.backbone, *segments.tail):
        means, count = _mean_rows(prepared, calibration, recorders)
        leaf = max(paths_at(prepared.depth), key=lambda path: _channels(prepared, path))
        keep: dict[str, torch.Tensor] = {}
        for number, branch in enumerate([*prefixes(leaf), leaf]):
            for group in prepared.owned(number):
                score = prepared.scores[group.name]
                if group.is_output():
                    score = channel_means(group, means[number].unsqueeze(0), number + 1)[0]
                elif number < prepared.depth and group.name in recorders[number].columns:
                    planes = means[number][prepared.features[number + 1] :]
                    score = planes[recorders[number].columns[group.name]]
                keep[group.name] = top_channels(score, prepared.width(group, branch), group.partitions)
        tail = [prepared.sliced(number, keep)[0] for number in range(len(segments.tail))]
        if prepared.config.repair != "none":
            pair = sample_pairs(
                segments,
                prepared.modalities[0],
                calibration,
                limit=prepared.config.repair_samples,
                count=count,
            )
            for number, (block, own) in enumerate(zip(segments.tail, tail, strict=True)):
                pair = fit_layers(block, own, prepared.slices(number, keep), pair)
        return StaticTwin([slice_module(segments.backbone, {}), *tail])


def _mean_rows(
    prepared: Prepared, calibration: Calibration, recorders: Sequence[InnerActivations]
) -> tuple[list[torch.Tensor], int]:
    """Per level, the mean over all data of the dense block's pooled outputs, then of its inner planes;
    and the number of this rank's samples.
    """
    sums: list[torch.Tensor] = []
    count = 0
    with ExitStack() as hooks:
        for recorder in recorders:
            hooks.enter_context(recorder)
        for inputs in calibration.batches():
            frontier = prepared.segments.enter(inputs)
            count += prepared.modalities[0].size(frontier)
            totals = []
            for level, (block, recorder) in enumerate(zip(prepared.segments.levels, recorders, strict=True)):
                before, frontier = frontier, call(block, frontier)
                rows = prepared.modalities[level + 1].pool(frontier)
                if recorder.columns:
                    rows = torch.cat([rows, recorder.rows(before, prepared.modalities[level])], dim=1)
                totals.append(rows.double().sum(dim=0).cpu())
            sums = [old + new for old, new in zip(sums, totals, strict=True)] if sums else totals
    samples = int(all_reduce_sum(torch.tensor([count])))
    return [all_reduce_sum(total) / samples for total in sums], count


def _channels(prepared: Prepared, leaf: str) -> int:
    return sum(
        prepared.width(group, branch)
        for number, branch in enumerate([*prefixes(leaf), leaf])
        for group in prepared.owned(number)
    )
