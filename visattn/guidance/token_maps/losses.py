"""Losses of token maps that latents are updated by. Maps are ``[samples, tokens, frames, height,
width]``; each loss is ``[samples]``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import conv2d, pad

__all__ = ["SIGMA", "astar_retention", "astar_segregation", "attend_and_excite"]

SIGMA = math.sqrt(0.5)  # standard deviation of the authors' blur, in tokens


def astar_segregation(maps: torch.Tensor) -> torch.Tensor:
    """How much the maps of subjects overlap: ``sum over pairs of sum_x min(A^m, A^n) / sum_x (A^m +
    A^n)`` (A-STAR, Agarwal et al. 2023, arXiv 2306.14544). From 0 to half the number of pairs.

    Source:
        Agarwal et al. (2023), "A-STAR", arXiv 2306.14544.
    Default:
        paper.
    Differences:
        none
    """
    flat = maps.flatten(2)
    total = flat.new_zeros(flat.shape[0])
    for m in range(1, flat.shape[1]):
        for n in range(m):
            total = total + _overlap(flat[:, m], flat[:, n])
    return total


def astar_retention(maps: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """How little of a layout the maps of subjects keep: ``sum_m [1 - sum_x min(A^m, B^m) / sum_x
    (A^m + B^m)]`` (A-STAR, arXiv 2306.14544). From half the number of subjects on.

    Args:
        layout: ``B``, where each subject was a step before or is to be: 0 or 1, ``[samples or 1,
            tokens, frames, height, width]``.

    Source:
        Agarwal et al. (2023), "A-STAR", arXiv 2306.14544.
    Default:
        paper.
    Differences:
        none
    """
    if layout.shape[1:] != maps.shape[1:] or layout.shape[0] not in (1, maps.shape[0]):
        raise ValueError(
            f"layout has the shape {list(layout.shape)}; the maps have {list(maps.shape)}"
        )
    own = layout.to(maps).expand_as(maps).flatten(2)
    return (1 - _overlap(maps.flatten(2), own)).sum(1)


def attend_and_excite(
    maps: torch.Tensor, subjects: Sequence[int], *, sharpness: float = 100.0, sigma: float = SIGMA
) -> torch.Tensor:
    """How little the most neglected subject is attended to anywhere: ``max_m (1 - max_x A^m)``,
    with ``A`` the softmax over tokens of ``sharpness`` times the maps, blurred in each frame by a 3
    x 3 Gaussian (Attend-and-Excite, Chefer et al. 2023, arXiv 2301.13826).

    Args:
        maps: of all real tokens, without padding and begin or end.
        subjects: numbers of the subjects among them.
        sigma: standard deviation of the Gaussian, in tokens. The default is that of the authors'
            code, whose kernel ``exp(-(x / (2 s))^2)`` with its parameter ``s = 0.5`` has the
            standard deviation ``sqrt(0.5)``; the paper's is 0.5.

    Source:
        Chefer et al. (2023), "Attend-and-Excite", arXiv 2301.13826. Code:
        github.com/yuval-alaluf/Attend-and-Excite (commit 163efdf).
    Default:
        code. ``sigma=0.5`` is the Gaussian of the paper.
    Differences:
        none
    """
    if not subjects:
        raise ValueError("attend_and_excite has no subjects; give numbers of tokens")
    own = (sharpness * maps).softmax(1)[:, list(subjects)]
    blurred = _blurred(own.flatten(0, 2)[:, None], sigma)
    largest = blurred.reshape(*own.shape[:2], -1).amax(2)
    return (1 - largest).amax(1)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    total = (one + other).sum(-1).clamp_min(torch.finfo(one.dtype).tiny)
    return torch.minimum(one, other).sum(-1) / total


def _blurred(frames: torch.Tensor, sigma: float) -> torch.Tensor:
    """Frames ``[n, 1, height, width]`` blurred, reflected at the borders; an axis of one token
    repeats it."""
    side = math.exp(-0.5 / sigma**2)
    taps = frames.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    for axis, (before, shape) in enumerate((((0, 0, 1, 1), (3, 1)), ((1, 1, 0, 0), (1, 3)))):
        mode = "reflect" if frames.shape[2 + axis] > 1 else "replicate"
        frames = conv2d(pad(frames, before, mode=mode), taps.reshape(1, 1, *shape))
    return frames
