"""Losses of token maps, for updates of the latents. Maps are ``[samples, tokens, frames, height,
width]``, losses ``[samples]``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import conv2d, pad

__all__ = ["SIGMA", "astar_retention", "astar_segregation", "attend_and_excite"]

SIGMA = math.sqrt(0.5)  # standard deviation in tokens of the blur in the authors' code


def astar_segregation(maps: torch.Tensor) -> torch.Tensor:
    """Return how much the maps of subjects overlap, summed over the pairs of subjects: ``sum_x
    min(A^m, A^n) / sum_x (A^m + A^n)`` (A-STAR, Agarwal et al. 2023, arXiv 2306.14544).

    Args:
        maps: the maps ``A`` of the subjects, ``[samples, tokens, frames, height, width]``.

    Returns:
        The loss of each sample, ``[samples]``, from 0 to half the number of pairs.

    Example:
        >>> import torch
        >>> from visattn.guidance import astar_segregation
        >>> maps = torch.tensor([[[[[1.0, 0.0]]], [[[0.0, 1.0]]]]])  # two subjects apart
        >>> astar_segregation(maps)
        tensor([0.])
        >>> astar_segregation(maps.mean(1, keepdim=True).expand(-1, 2, -1, -1, -1))
        tensor([0.5000])

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
    """Return how far the maps of subjects are from a layout, summed over the subjects: ``1 - sum_x
    min(A^m, B^m) / sum_x (A^m + B^m)`` (A-STAR, Agarwal et al. 2023, arXiv 2306.14544).

    Args:
        maps: the maps ``A`` of the subjects, ``[samples, tokens, frames, height, width]``.
        layout: the layout ``B``: 1 at the tokens of each subject in the previous step, or at the
            wanted ones, else 0, ``[samples or 1, tokens, frames, height, width]``.

    Returns:
        The loss of each sample, ``[samples]``, at least half the number of subjects.

    Raises:
        ValueError: ``layout`` does not fit the maps.

    Example:
        >>> import torch
        >>> from visattn.guidance import astar_retention
        >>> maps = torch.tensor([[[[[1.0, 0.0]]]]])
        >>> astar_retention(maps, layout=maps), astar_retention(maps, layout=1 - maps)
        (tensor([0.5000]), tensor([1.]))

    Source:
        Agarwal et al. (2023), "A-STAR", arXiv 2306.14544.
    Default:
        paper.
    Differences:
        none
    """
    if layout.shape[1:] != maps.shape[1:] or layout.shape[0] not in (1, maps.shape[0]):
        raise ValueError(
            f"layout has the shape {list(layout.shape)}; it must have that of the maps, "
            f"{list(maps.shape)}, or one sample"
        )
    flat = layout.to(maps).expand_as(maps).flatten(2)
    return (1 - _overlap(maps.flatten(2), flat)).sum(1)


def attend_and_excite(
    maps: torch.Tensor, subjects: Sequence[int], *, sharpness: float = 100.0, sigma: float = SIGMA
) -> torch.Tensor:
    """Return how little attention the most neglected subject gets: ``max_m (1 - max_x A^m)``, where
    ``A`` is the softmax over tokens of ``sharpness`` times the maps, blurred in each frame by a 3 x
    3 Gaussian (Attend-and-Excite, Chefer et al. 2023, arXiv 2301.13826).

    Args:
        maps: maps of all real tokens, without padding and special tokens, ``[samples, tokens,
            frames, height, width]``.
        subjects: indices of the subjects among these tokens.
        sharpness: factor of the maps before the softmax.
        sigma: standard deviation of the Gaussian, in tokens. The default is that of the authors'
            code, whose kernel ``exp(-(x / (2 s))^2)`` with its parameter ``s = 0.5`` has the
            standard deviation ``sqrt(0.5)``; the paper's is 0.5.

    Returns:
        The loss of each sample, ``[samples]``, from 0 to 1.

    Raises:
        ValueError: ``subjects`` is empty.

    Example:
        >>> import torch
        >>> from visattn.guidance import attend_and_excite
        >>> maps = torch.tensor([[[[[0.9, 0.9]]], [[[0.1, 0.1]]]]])  # two tokens, one neglected
        >>> attend_and_excite(maps, subjects=[0]).round(decimals=3)
        tensor([0.])
        >>> attend_and_excite(maps, subjects=[0, 1]).round(decimals=3)
        tensor([1.])

    Source:
        Chefer et al. (2023), "Attend-and-Excite", arXiv 2301.13826. Code:
        github.com/yuval-alaluf/Attend-and-Excite (commit 163efdf).
    Default:
        code. ``sigma=0.5`` is the Gaussian of the paper.
    Differences:
        none
    """
    if not subjects:
        raise ValueError("attend_and_excite has no subjects; give indices of tokens")
    attention = (sharpness * maps).softmax(1)[:, list(subjects)]
    blurred = _blurred(attention.flatten(0, 2)[:, None], sigma)
    largest = blurred.reshape(*attention.shape[:2], -1).amax(2)
    return (1 - largest).amax(1)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return ``sum min(a, b) / sum (a + b)`` over the last axis."""
    total = (one + other).sum(-1).clamp_min(torch.finfo(one.dtype).tiny)
    return torch.minimum(one, other).sum(-1) / total


def _blurred(frames: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur frames ``[n, 1, height, width]`` with reflected borders. An axis with one token is
    padded with that token."""
    side = math.exp(-0.5 / sigma**2)
    taps = frames.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    for axis, (before, shape) in enumerate((((0, 0, 1, 1), (3, 1)), ((1, 1, 0, 0), (1, 3)))):
        mode = "reflect" if frames.shape[2 + axis] > 1 else "replicate"
        frames = conv2d(pad(frames, before, mode=mode), taps.reshape(1, 1, *shape))
    return frames
