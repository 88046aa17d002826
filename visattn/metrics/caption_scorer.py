"""Verdicts on clips by the captions of the small model."""

from __future__ import annotations

import torch

from visattn.metrics.prompt import parse_caption, score_prompt

__all__ = ["caption_scorer"]


def caption_scorer(frames: torch.Tensor, prompt: str) -> dict[str, float]:
    """Judge whether a video shows the colour, object and direction of its caption.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        prompt: as in ``a red square moves left over the fog``.

    Returns:
        Verdicts by name, each from 0 to 1; empty for a prompt that is no such caption.
    """
    try:
        parse_caption(prompt)
    except ValueError:
        return {}
    score = score_prompt(frames.permute(0, 3, 1, 2), prompt)
    return {"colour": score.colour, "object": score.object, "direction": score.direction}
