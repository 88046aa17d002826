"""Objectives of the search for heads: numbers that are larger for better frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from visattn.metrics.prompt import score_prompt

__all__ = ["Objective", "caption_score", "name_of"]

# Of frames, float32 [T, H, W, 3] in [0, 1] on the CPU, and their prompt; T is 1 for an image.
Objective = Callable[[torch.Tensor, str], float]


def caption_score(frames: torch.Tensor, prompt: str) -> float:
    """Return which share of a caption a video of the small model shows: the mean of the scores of
    colour, object, direction and background (``visattn.metrics.prompt``).

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        prompt: as in ``a red square moves left over the fog``.

    Returns:
        A number from 0 to 1.

    Raises:
        ValueError: the prompt is no such caption.

    Example:
        >>> import torch
        >>> from visattn.guidance import caption_score
        >>> frames = torch.zeros(5, 64, 64, 3)
        >>> 0 <= caption_score(frames, "a red square moves left over the fog") <= 1
        True
    """
    return score_prompt(frames.permute(0, 3, 1, 2), prompt).mean


def name_of(objective: Any) -> str:
    """Return where an objective is defined, as ``module:function``; for an object, where its class
    is defined.

    Args:
        objective: a function, or an object that can be called.
    """
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{named.__module__}:{named.__qualname__}"
