"""How patterns and kinds of plans look on every page: colours, letters and marks.

Colours of patterns are those of ``visattn.draw.palette``; the letters in a cell also identify the
pattern.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from visattn.draw.palette import PAGE_INKS, contrast, pattern_colors, rgb

__all__ = ["KINDS", "MARKS", "Family", "Mark", "families_of", "kind_class"]


class Family(NamedTuple):
    """How the cells of a kind of pattern look."""

    name: str
    color: str
    ink: str
    letters: str


def families_of(names: Iterable[str]) -> list[Family]:
    """Return a colour and letters for each pattern, in the order of the palette."""
    families: list[Family] = []
    for name, color in pattern_colors(names).items():
        ink = max(PAGE_INKS, key=lambda ink: contrast(rgb(ink), rgb(color)))
        families.append(Family(name, color, ink, _letters(name, {x.letters for x in families})))
    return families


def _letters(name: str, taken: set[str]) -> str:
    """Return one letter, or more characters where another pattern has that letter."""
    words = name.replace("-", "_").split("_")
    tries = [name[:1], "".join(word[:1] for word in words)[:2], name[:2]]
    tries += [f"{name[:1]}{digit}" for digit in range(2, 1000)]
    return next(text for text in map(str.capitalize, tries) if text and text not in taken)


class Mark(NamedTuple):
    """The mark of a kind of plan: its name in the style sheet, and a path about (0, 0)."""

    name: str
    path: str


KINDS = {
    "searched": Mark("searched", "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z"),
    "uniform static": Mark("static", "M-4.5-4.5H4.5V4.5H-4.5Z"),
    "uniform dynamic": Mark("dynamic", "M0-6L6 0L0 6L-6 0Z"),
    "published rule": Mark("rule", "M0-5.5L5.5 4.5H-5.5Z"),
    "random": Mark("random", "M-4.5-4.5L4.5 4.5M4.5-4.5L-4.5 4.5"),
    "oracle": Mark("oracle", "M-6 0H-2M2 0H6M0-6V-2M0 2V6"),
    "dense": Mark("dense", "M0-5.5V5.5M-5.5 0H5.5"),
}
OTHER = Mark("other", "M-5.5-4.5H5.5L0 5.5Z")
MARKS = (*KINDS.values(), OTHER)


def kind_class(kind: object) -> str:
    """Return the style sheet's name of a kind of plan."""
    return KINDS.get(str(kind), OTHER).name
