"""Real photographs, muted: those that scikit-learn and scikit-image carry in their packages.

Saturation tells objects from backgrounds, so photographs keep only a part of their own.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# (package, file inside it); the last ones are held out.
TRAINED = (
    ("sklearn", "datasets/images/china.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/motorcycle_left.png"),
)
HELD_OUT = (
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/brick.png"),
)
SATURATION = 0.3  # share of a photograph's own that it keeps
CONTRAST = 0.8


@functools.cache
def photographs(held_out: bool) -> tuple[Tensor, ...]:
    """Return the muted photographs, each ``[3, height, width]`` in [0, 1]."""
    found = []
    for package, name in HELD_OUT if held_out else TRAINED:
        folder = importlib.import_module(package).__path__[0]
        path = Path(folder, name)
        if not path.is_file():  # a release of the package that ships fewer files
            continue
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
        colour = torch.from_numpy(pixels).permute(2, 0, 1)
        grey = colour.mean(0, keepdim=True)
        muted = grey + SATURATION * (colour - grey)
        found.append(0.5 + CONTRAST * (muted - 0.5))
    if not found:
        raise ValueError("no photograph was found; install scikit-learn and scikit-image")
    return tuple(found)


def _crop(image: Tensor, corners: Tensor, side: Tensor, size: tuple[int, int]) -> Tensor:
    """Return square windows of an image, ``[N, 3, height, width]``.

    ``corners`` ``[N, 2]`` are (x, y) and ``side`` ``[N]`` the sizes, in the image's pixels.
    """
    height, width = size
    limit = torch.tensor([image.shape[2], image.shape[1]])
    u = (torch.arange(width) + 0.5) / width
    v = (torch.arange(height) + 0.5) / height
    x = (corners[:, 0:1] + side[:, None] * u) / limit[0] * 2 - 1
    y = (corners[:, 1:2] + side[:, None] * v) / limit[1] * 2 - 1
    grid = torch.stack(
        (x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1
    )
    return F.grid_sample(
        image.expand(len(side), -1, -1, -1), grid, padding_mode="border", align_corners=False
    )


def _choose(held_out: bool, rng: np.random.Generator) -> Tensor:
    images = photographs(held_out)
    return images[int(rng.integers(len(images)))]


def moving_background(
    size: tuple[int, int, int], held_out: bool, rng: np.random.Generator
) -> Tensor:
    """Return a photograph that pans or zooms slowly, ``[frames, 3, height, width]``."""
    image = _choose(held_out, rng)
    num_frames, height, width = size
    shorter = min(image.shape[1:])
    side_first, side_last = rng.uniform(0.55, 0.9, 2) * shorter
    if rng.random() < 0.5:  # a pan: the window keeps its size
        side_last = side_first
    time = torch.linspace(0, 1, num_frames)
    side = side_first + (side_last - side_first) * time
    room = torch.tensor([image.shape[2], image.shape[1]]) - max(side_first, side_last)
    first = torch.from_numpy(rng.uniform(0, 1, 2)).float() * room
    last = first + torch.from_numpy(rng.uniform(-0.3, 0.3, 2)).float() * shorter
    last = torch.minimum(last.clamp(min=0), room)
    corners = first + (last - first) * time[:, None]
    # Twice the size and then the mean of four, so that a large photograph does not alias.
    large = _crop(image, corners, side, (2 * height, 2 * width))
    return F.avg_pool2d(large, 2)


def patch(side: int, held_out: bool, rng: np.random.Generator) -> Tensor:
    """Return a piece of a photograph, ``[3, side, side]``."""
    image = _choose(held_out, rng)
    window = float(rng.uniform(0.3, 0.6)) * min(image.shape[1:])
    room = torch.tensor([image.shape[2], image.shape[1]]) - window
    corner = torch.from_numpy(rng.uniform(0, 1, 2)).float() * room
    large = _crop(image, corner[None], torch.tensor([window]), (2 * side, 2 * side))
    return F.avg_pool2d(large, 2)[0]
