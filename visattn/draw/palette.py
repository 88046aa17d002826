"""The colours of all pictures and pages. Each is defined once: here, or by the class of a pattern.

The hues of patterns say the family (after Okabe and Ito, for colour-blind readers), the lightness
says the pattern. The theme of the receipt page is in ``visattn/report/receipt.css``.
"""

from __future__ import annotations

from collections.abc import Iterable

import visattn.selectors  # noqa: F401  # registers the dynamic patterns
from visattn.patterns.base.head_pattern import KINDS

__all__ = [
    "BAR",
    "EMPTY",
    "FAMILIES",
    "GREY",
    "GRID_BANDS",
    "HEAT",
    "INK",
    "KEPT",
    "LOW_SHARE",
    "PAGE_INKS",
    "PAPER",
    "PARTIAL",
    "QUERY",
    "SHORT",
    "SPARE",
    "WHOLE_TEXT",
    "Color",
    "contrast",
    "pattern_colors",
    "readable_ink",
    "rgb",
]

Color = tuple[int, int, int]  # red, green and blue, 0 to 255

PAPER: Color = (255, 255, 255)
INK: Color = (28, 33, 40)
GREY: Color = (101, 109, 118)

# cells of a pattern: pairs that are not kept, pairs that are, and the query that is looked at
EMPTY: Color = (234, 238, 242)
KEPT: Color = (36, 71, 117)
QUERY: Color = (214, 48, 42)
# classes of blocks, besides empty and kept ones
WHOLE_TEXT: Color = (62, 145, 128)
SHORT: Color = (135, 104, 178)
PARTIAL: Color = (229, 160, 62)
GRID_BANDS: tuple[Color, Color] = ((160, 169, 180), (205, 211, 218))  # alternate frames
# amounts of attention, from none to the most
HEAT: tuple[Color, ...] = (EMPTY, (150, 188, 212), (72, 126, 176), KEPT, (12, 20, 44))
BAR: Color = (120, 134, 150)
LOW_SHARE: Color = (26, 127, 84)  # text of a share that is small

# families of patterns in the order of legends; other families follow
FAMILIES = ("learned", "plain", "boxes", "bands", "composed", "dynamic")
PAGE_INKS = ("#ffffff", "#000000")  # of letters on the colour of a pattern, on pages
# for patterns whose class has no colour
SPARE = ("#f0e442", "#bdb320", "#7f6bb5", "#a594d6", "#8c6d4f", "#c4a484")


def rgb(color: str) -> Color:
    """Return ``"#rrggbb"`` as red, green and blue."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def contrast(first: Color, second: Color) -> float:
    """Return the contrast of two colours, from 1 to 21, as WCAG 2 defines it."""
    dark, light = sorted((_luminance(first), _luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def readable_ink(color: Color) -> Color:
    """Return paper or ink, whichever has the higher contrast to a colour."""
    return max((PAPER, INK), key=lambda ink: contrast(ink, color))


def pattern_colors(names: Iterable[str]) -> dict[str, str]:
    """Return the colour of each pattern, ``"#rrggbb"``, by name.

    Args:
        names: names of patterns; one that no class has, or whose class has no colour of its own,
            gets a spare colour.

    Returns:
        the colours, families together, in the order of ``FAMILIES``; unknown names last.
    """
    places = {name: place for place, name in enumerate(KINDS)}

    def rank(name: str) -> tuple[int, int, str]:
        if name not in KINDS:
            return len(FAMILIES) + 1, 0, name
        family = KINDS[name].family
        group = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
        return group, places[name], name

    colors: dict[str, str] = {}
    num_spare = 0
    for name in sorted(set(names), key=rank):
        color = vars(KINDS[name]).get("color") if name in KINDS else None
        if color is None:
            color = SPARE[num_spare % len(SPARE)]
            num_spare += 1
        colors[name] = color
    return colors


def _luminance(color: Color) -> float:
    shares = (channel / 255 for channel in color)
    linear = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares)
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
