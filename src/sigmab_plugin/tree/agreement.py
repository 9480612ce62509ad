"""Whether two runs gave the same values."""

from __future__ import annotations

from torch import Tensor


def agree(found: Tensor, wanted: Tensor, *, tolerance: float) -> bool:
    """Equal shapes and infinities, and finite values that differ by at most ``tolerance`` times the largest one."""
    if found.shape != wanted.shape:
        return False
    finite = wanted.isfinite()
    if not bool((finite == found.isfinite()).all()):
        return False
    if not bool(finite.any()):
        return True
    first, second = found[finite].double(), wanted[finite].double()
    return float((first - second).abs().max()) <= tolerance * float(second.abs().max())
