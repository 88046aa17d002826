"""Outlines of the objects: what is drawn in colour, as opacities on a square of SIDE × SIDE.

Shapes are drawn from their distance fields. Digits are real handwriting: scikit-learn's 8 × 8 set,
narrowed to the clearly written ones and split into instances to train on and instances held out.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.metrics.prompt import DIGITS, PICTURE, SHAPES

SIDE = 64
MARGIN = 3  # empty points around a digit
FRAME_WIDTH = 0.22  # of a picture's coloured frame, in half sides
NEIGHBOURS = 5  # a digit is clear when that many nearest ones are of its class
HELD_OUT_EVERY = 5  # one clear digit in that many is held out


def _coordinates() -> tuple[Tensor, Tensor]:
    """Return x and y of the square's points in (−1, 1), each ``[SIDE, SIDE]``."""
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _distance(shape: str) -> Tensor:
    """Return the signed distance to the shape's edge in half sides, negative inside."""
    x, y = _coordinates()
    if shape == "circle":
        return (x.square() + y.square()).sqrt() - 0.9
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.8
    if shape == "triangle":  # on its base
        slope = 0.5  # half a base for each unit of height
        side = (x.abs() - slope * (y + 0.9)) / (1 + slope**2) ** 0.5
        return torch.maximum(side, y - 0.8)
    if shape == "cross":
        bar = torch.maximum(x.abs() - 0.32, y.abs() - 0.9)
        return torch.minimum(bar, bar.T)
    if shape == PICTURE:
        outer = torch.maximum(x.abs(), y.abs())
        return torch.maximum(outer - 0.85, 0.85 - 2 * FRAME_WIDTH - outer)
    raise ValueError(f"shape={shape!r} must be one of {(*SHAPES, PICTURE)}")


@functools.cache
def shape_sprite(shape: str) -> Tensor:
    """Return the opacity of a shape with soft edges, ``[SIDE, SIDE]``."""
    softness = 0.045
    return torch.sigmoid(-_distance(shape) / softness)


@functools.cache
def picture_opening() -> Tensor:
    """Return the opacity of the photograph inside a picture's frame, ``[SIDE, SIDE]``."""
    x, y = _coordinates()
    inner = torch.maximum(x.abs(), y.abs()) - (0.85 - FRAME_WIDTH)
    return torch.sigmoid(-inner / 0.045)


@functools.cache
def digit_images(digit: int, held_out: bool) -> Tensor:
    """Return the clear instances of a digit, ``[N, 8, 8]`` in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16.0
    norms = (images**2).sum(1)
    distances = norms[:, None] + norms[None] - 2 * images @ images.T
    np.fill_diagonal(distances, np.inf)
    nearest = labels[np.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS]]
    clear = (nearest == labels[:, None]).all(1) & (labels == digit)
    chosen = images[clear]
    is_held_out = np.arange(len(chosen)) % HELD_OUT_EVERY == 0
    return torch.from_numpy(chosen[is_held_out == held_out]).float().view(-1, 8, 8)


def strokes(images: Tensor) -> Tensor:
    """Return the opacities of handwritten digits ``[N, 8, 8]``, as ``[N, SIDE, SIDE]``."""
    inner = SIDE - 2 * MARGIN
    large = F.interpolate(images[:, None], size=(inner, inner), mode="bicubic")[:, 0]
    large = F.pad(large, (MARGIN, MARGIN, MARGIN, MARGIN))
    large = F.avg_pool2d(large[:, None], 5, stride=1, padding=2)[:, 0]
    ramp = ((large - 0.12) / 0.36).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


@functools.cache
def digit_sprites(name: str, held_out: bool) -> Tensor:
    """Return the opacities of all instances of the digit called ``name``, ``[N, SIDE, SIDE]``."""
    return strokes(digit_images(DIGITS[name], held_out))
