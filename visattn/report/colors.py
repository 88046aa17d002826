"""How patterns and kinds of plans look on every page: colours, letters and marks.

Colours of patterns are those of ``visattn.draw.palette``; the letters in a cell also identify the
pattern.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from visattn.draw.palette import PAGE_INKS, contrast, pattern_colors, rgb
from visattn.report.markup import Html, joined, put

__all__ = ["KINDS", "Family", "families_of", "kind_class", "kind_mark", "symbols"]


class Family(NamedTuple):
    """How the cells of a family look."""

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
    """One letter, or two signs where another family has it."""
    words = name.replace("-", "_").split("_")
    tries = [name[:1], "".join(word[:1] for word in words)[:2], name[:2]]
    tries += [f"{name[:1]}{digit}" for digit in range(2, 1000)]
    return next(text for text in map(str.capitalize, tries) if text and text not in taken)


# The kinds of plans: the style sheet's name, and a shape about (0, 0).
KINDS = {
    "searched": ("searched", "M0-5A5 5 0 1 1 0 5A5 5 0 1 1 0-5Z"),
    "uniform static": ("static", "M-4.5-4.5H4.5V4.5H-4.5Z"),
    "uniform dynamic": ("dynamic", "M0-6L6 0L0 6L-6 0Z"),
    "published rule": ("rule", "M0-5.5L5.5 4.5H-5.5Z"),
    "random": ("random", "M-4.5-4.5L4.5 4.5M4.5-4.5L-4.5 4.5"),
    "oracle": ("oracle", "M-6 0H-2M2 0H6M0-6V-2M0 2V6"),
    "dense": ("dense", "M0-5.5V5.5M-5.5 0H5.5"),
}
OTHER = ("other", "M-5.5-4.5H5.5L0 5.5Z")


def kind_class(kind: object) -> str:
    """What the style sheet calls a kind of plan."""
    return KINDS.get(str(kind), OTHER)[0]


def kind_mark(kind: object) -> Html:
    """The sign of a kind of plan, as large as a letter."""
    mark = '<svg class="mark k-{0}" viewBox="-7 -7 14 14" aria-hidden="true"><use href="#m-{0}"/>'
    return put(mark + "</svg>", kind_class(kind))


def symbols() -> Html:
    """The signs, once for the page."""
    shapes = joined(put('<path id="m-{}" d="{}"/>', *kind) for kind in (*KINDS.values(), OTHER))
    return put('<svg class="symbols" aria-hidden="true"><defs>{}</defs></svg>', shapes)
