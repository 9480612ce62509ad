"""What a technique did to a network, in one line for people and as figures for machines; the same on every NNCF."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..counting import parameter_count
from ..tree.net import SigmaBNet
from .nncf_schema import parameter_line, tree_line

_FORMS = {
    "codebook": "as a codebook and an index per block (header of the file not counted)",
    "sparse": "as one bit per weight and the weights that are not zero",
}


def outcome(before: nn.Module, after: nn.Module) -> tuple[str, dict[str, Any]]:
    """Parameters before and after, and bytes where the weights are now stored in another form."""
    from ..techniques.footprint import footprint  # not on NNCF's import

    stored = parameter_count(before)
    if isinstance(after, SigmaBNet) and not isinstance(before, SigmaBNet):
        counts = after.parameter_counts()
        facts: dict[str, Any] = {"dense": stored, "stored": counts.total, "active": counts.active}
        return tree_line(stored, counts.total, counts.active, len(after.leaves)), facts
    text = parameter_line(stored, parameter_count(after))
    facts = {"before": stored, "after": parameter_count(after)}
    if isinstance(before, SigmaBNet) and isinstance(after, SigmaBNet):
        was, now = before.parameter_counts().active, after.parameter_counts().active
        facts |= {"active_before": was, "active": now}
        if was != now:
            text += f"; active {was:,} before, {now:,} after"
    size, packed = footprint(before), footprint(after)
    facts |= {"bytes_before": size.stored, "bytes": packed.stored, "form": packed.form}
    if packed.form != size.form:
        text += f"; {size.stored:,} bytes before, {packed.stored:,} after {_FORMS[packed.form]}"
    return text, facts
