"""Numbers and settings as the page prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["DASH", "figure", "plain"]

DASH = "–"


def figure(value: object, unit: str = "", digits: int | None = None) -> str:
    """Return a value as the page prints it.

    Args:
        value: a number, or anything else; None, NaN and infinities are printed as a dash.
        unit: text after the value.
        digits: decimals of a number; None prints three significant digits.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return f"{value}{unit}"
    if digits is not None:
        text = f"{value:.{digits}f}"
    elif isinstance(value, int) or value == 0:
        text = f"{value:.0f}"
    elif abs(value) < 1e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return f"{text.replace('-', '−')}{unit}"


def plain(value: object) -> str:
    """Return a setting as it was given; lists and mappings in one line."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    finite = isinstance(value, float) and math.isfinite(value)
    return f"{value:.6g}".replace("-", "−") if finite else figure(value)
