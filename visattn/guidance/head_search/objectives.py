"""What heads are searched for: a number that is larger for better frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from visattn.metrics.prompt import score_prompt

__all__ = ["Objective", "caption_score", "name_of"]

# Of frames, float32 [T, H, W, 3] in [0, 1] on the CPU, and their prompt; T is 1 for an image.
Objective = Callable[[torch.Tensor, str], float]


def caption_score(frames: torch.Tensor, prompt: str) -> float:
    """The share of a caption's words that a video of the small model shows, over colour, object,
    direction and background (``metrics.prompt``).

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        prompt: as in ``a red square moves left over the fog``.

    Raises:
        ValueError: the prompt is no such caption.
    """
    return score_prompt(frames.permute(0, 3, 1, 2), prompt).mean


def name_of(objective: Any) -> str:
    """Where an objective is defined, as ``module:function``; that of its class where it is an
    object."""
    own = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{own.__module__}:{own.__qualname__}"
