"""HTML whose text cannot become markup, and numbers as they are printed."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping

__all__ = ["DASH", "Html", "figure", "interval", "joined", "plain", "put"]

DASH = "–"


class Html(str):
    """Text that is markup already; any other text is escaped where it is put in."""


def put(template: str, *values: object) -> Html:
    """The template with its ``{}`` filled in turn: ``Html`` as it is, ``None`` as nothing, anything
    else escaped."""
    texts = (
        value if isinstance(value, Html) else "" if value is None else html.escape(str(value))
        for value in values
    )
    return Html(template.format(*texts))


def joined(parts: Iterable[Html]) -> Html:
    """The parts one after the other."""
    return Html("".join(parts))


def figure(value: object, unit: str = "", digits: int | None = None) -> str:
    """A value as it is printed: numbers with so many decimals, or with three digits that count;
    ``None`` as a dash."""
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
    """A value as it was given, as settings should be; lists and mappings in one line."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(part)}" for key, part in value.items())
    finite = isinstance(value, float) and math.isfinite(value)
    return f"{value:.6g}".replace("-", "−") if finite else figure(value)


def interval(low: object, high: object, digits: int | None = None) -> Html | None:
    """``[30.1, 32.3]`` in small type, or nothing without both ends."""
    if low is None or high is None:
        return None
    return put(" <small>[{}, {}]</small>", *(figure(end, "", digits) for end in (low, high)))
