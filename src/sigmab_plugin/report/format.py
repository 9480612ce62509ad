"""Numbers as people read them: one place, so that the text table and the page agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Stands for a figure that was not measured.
ABSENT = "–"

_COUNT_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def integer(value: int | None) -> str:
    """``9405834`` -> ``9,405,834``."""
    return ABSENT if value is None else f"{value:,}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """``0.3968`` -> ``39.7 %``; a value that is not finite counts as absent."""
    if fraction is None or not math.isfinite(fraction):
        return ABSENT
    return f"{100 * fraction:.{digits}f} %"


def points(difference: float, digits: int = 1) -> str:
    """A difference of two fractions in percentage points, with its sign: ``+0.8 pp``."""
    rounded = round(100 * difference, digits)
    if rounded == 0:
        return f"±{0:.{digits}f} pp"
    return f"{'+' if rounded > 0 else '−'}{abs(rounded):.{digits}f} pp"


def count(value: int | float | None) -> str:
    """``9405834`` -> ``9.41 M``: three significant digits and a decimal prefix."""
    return _scaled(value, _COUNT_UNITS)


def size(value: int | float | None) -> str:
    """Bytes with a decimal prefix: ``37623336`` -> ``37.6 MB``."""
    return _scaled(value, _BYTE_UNITS)


def column_unit(values: Sequence[int | float | None], *, of_bytes: bool = False) -> tuple[float, str]:
    """The one unit that a whole column is printed in: (divisor, prefix), chosen by its largest value."""
    units = _BYTE_UNITS if of_bytes else _COUNT_UNITS
    largest = max((value for value in values if value is not None), default=0)
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def in_unit(value: int | float | None, unit: tuple[float, str]) -> str:
    """A figure of a column in the column's unit, with decimals that line up."""
    if value is None:
        return ABSENT
    return f"{value:,}" if unit[0] == 1.0 else f"{value / unit[0]:,.2f}"


def _scaled(value: int | float | None, units: Sequence[tuple[float, str]]) -> str:
    if value is None:
        return ABSENT
    factor, name = next((unit for unit in units if value >= unit[0]), units[-1])
    number = value / factor
    digits = 0 if factor == 1.0 or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {name}".rstrip()
