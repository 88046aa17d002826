"""Shapes of attention in image and video models, by name."""

from __future__ import annotations

from typing import NamedTuple

from visattn.geometry.layout import Grid, TokenLayout

__all__ = ["SHAPES", "Shape"]


class Shape(NamedTuple):
    """Tokens, heads and head size of a self-attention.

    Attributes:
        layout: layout of the tokens.
        heads: number of heads.
        head_size: channels of a head.

    Example:
        >>> from visattn.bench import SHAPES
        >>> SHAPES["wan-1.3b-480p"].layout.length
        32760
    """

    layout: TokenLayout
    heads: int
    head_size: int


SHAPES: dict[str, Shape] = {
    "tiny-wan-evaluation": Shape(TokenLayout(Grid(7, 12, 12)), 2, 64),
    "tiny-wan": Shape(TokenLayout(Grid(9, 16, 16)), 2, 64),
    "cpu-8k": Shape(TokenLayout(Grid(8, 32, 32)), 4, 64),
    "cpu-8k-line": Shape(TokenLayout(Grid(1, 1, 8192)), 4, 64),
    "cpu-8k-frames": Shape(TokenLayout(Grid(64, 16, 8)), 4, 64),
    "wan-1.3b-480p": Shape(TokenLayout(Grid(21, 30, 52)), 12, 128),
    "wan-1.3b-720p": Shape(TokenLayout(Grid(21, 45, 80)), 12, 128),
    "wan-14b-480p": Shape(TokenLayout(Grid(21, 30, 52)), 40, 128),
    "wan-14b-720p": Shape(TokenLayout(Grid(21, 45, 80)), 40, 128),
    "hunyuan-720p": Shape(TokenLayout(Grid(33, 45, 80), text_after=256), 24, 128),
    "hunyuan-768p": Shape(TokenLayout(Grid(30, 48, 80)), 24, 128),
    "cogvideox1.5": Shape(TokenLayout(Grid(11, 48, 85), text_before=226), 48, 64),
    "ltx": Shape(TokenLayout(Grid(16, 16, 24)), 32, 64),
    "mochi": Shape(TokenLayout(Grid(28, 30, 53), text_after=256), 24, 128),
    "cosmos": Shape(TokenLayout(Grid(16, 44, 80)), 32, 128),
    "flux-1k": Shape(TokenLayout(Grid(1, 64, 64), text_before=512), 24, 128),
    "flux-2k": Shape(TokenLayout(Grid(1, 128, 128), text_before=512), 24, 128),
    "flux-4k": Shape(TokenLayout(Grid(1, 256, 256), text_before=512), 24, 128),
}
