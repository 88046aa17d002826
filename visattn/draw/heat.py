"""Colours for attention weights, as multiples of uniform attention on a logarithmic scale."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw

from visattn.draw.canvas import cells_picture, font, write
from visattn.draw.palette import GREY, HEAT, PAPER, Color

__all__ = ["heat_picture", "legend", "top_of"]

LEVELS = 254  # colours of the scale; one more is for missing values
MOST = 5  # powers of ten on the scale


def _ramp() -> tuple[Color, ...]:
    """Return ``LEVELS`` colours from light to dark, then that of the paper."""
    colors: list[Color] = []
    for level in range(LEVELS):
        place = level / (LEVELS - 1) * (len(HEAT) - 1)
        low = min(int(place), len(HEAT) - 2)
        red, green, blue = (
            round(a + (b - a) * (place - low))
            for a, b in zip(HEAT[low], HEAT[low + 1], strict=True)
        )
        colors.append((red, green, blue))
    return (*colors, PAPER)


RAMP = _ramp()


def top_of(values: torch.Tensor) -> int:
    """Return the power of ten at the dark end of a scale that covers 99.9 % of the values."""
    finite = values[torch.isfinite(values)]
    peak = float(finite.float().quantile(0.999)) if 0 < len(finite) < 1 << 24 else 10.0
    return max(1, min(MOST, math.ceil(math.log10(max(peak, 1.0)) - 0.3)))


def heat_picture(values: torch.Tensor, power: int, height: int, width: int) -> Image.Image:
    """Draw values ``[rows, columns]`` as cells of ``height`` by ``width`` pixels.

    Values up to 1 are light, values from ``10 ** power`` are dark, NaN is blank.
    """
    level = values.float().clamp(min=1.0).log10() / power * (LEVELS - 1)
    level = level.round().clamp(max=LEVELS - 1).nan_to_num(LEVELS)
    return cells_picture(level.to(torch.uint8), RAMP, height, width)


def legend(power: int, width: int = 420) -> Image.Image:
    """Draw the scale of ``heat_picture``, with its powers of ten."""
    out = Image.new("RGB", (width + 80, 58), PAPER)
    draw = ImageDraw.Draw(out)
    for x in range(width):
        color = RAMP[x * LEVELS // width]
        draw.line([(x + 30, 0), (x + 30, 21)], color)
    for tick in range(power + 1):
        x = 30 + tick * (width - 1) // power
        draw.line([(x, 22), (x, 27)], GREY)
        text = f"{10**tick}x"
        write(out, x - int(font(20).getlength(text)) // 2, 30, text, 20, GREY)
    return out
