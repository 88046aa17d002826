"""Colours and signs that mean the same on every page.

Hues say the group (Okabe and Ito's, which the colour-blind tell apart), lightness and the letters
in a cell say the family.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from visattn.report.markup import Html, joined, put

__all__ = ["KINDS", "Family", "contrast", "families_of", "kind_class", "kind_mark", "symbols"]

COLORS = {
    "stencil": "#0072b2", "dense": "#4d5660", "skip": "#c9ced3",
    # boxes
    "neighborhood": "#56b4e9", "sliding_tile": "#3a97cf", "block": "#8ccdf3",
    "shifted_block": "#2b7fb3", "grid_blocks": "#aadbf7", "halo": "#1f6690",
    # bands and columns
    "diagonal": "#e69f00", "multi_diagonal": "#d55e00", "radial": "#f3bd4b", "sharded": "#a64a00",
    "stripe": "#b97f00",
    # patterns of patterns
    "union": "#009e73", "axis_order": "#57c4a2", "online_choice": "#00795a", "reuse": "#8fd9c1",
    # chosen anew for each input
    "top_blocks": "#cc79a7", "pyramid": "#a8588a", "pisa": "#e3a8c8", "sparge": "#8a3f6f",
    "vmoba": "#f0c9de", "moba": "#b9699a",
}
INKS = ("#ffffff", "#000000")
OTHERS = ("#f0e442", "#bdb320", "#7f6bb5", "#a594d6", "#8c6d4f", "#c4a484")


class Family(NamedTuple):
    """How the cells of a family look."""

    name: str
    color: str
    ink: str
    letters: str


def families_of(names: Iterable[str]) -> list[Family]:
    """A colour and letters for each family, those of the fixed table first."""
    found: list[Family] = []
    present = set(names)
    for name in [*(name for name in COLORS if name in present), *sorted(present - set(COLORS))]:
        spare = sum(family.name not in COLORS for family in found)
        color = COLORS.get(name, OTHERS[spare % len(OTHERS)])
        _, ink = max((contrast(ink, color), ink) for ink in INKS)
        letters = _letters(name, {family.letters for family in found})
        found.append(Family(name, color, ink, letters))
    return found


def contrast(one: str, other: str) -> float:
    """Of two colours, from 1 to 21, as WCAG 2 defines it."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return sum(share * x for share, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


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
