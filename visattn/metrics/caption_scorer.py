"""Verdicts on clips by the captions of the small model, and the scorers that a model can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from visattn.metrics.prompt import parse_caption, score_prompt

__all__ = ["SCORERS", "caption_scorer"]


def caption_scorer(frames: torch.Tensor, prompt: str) -> dict[str, float]:
    """Judge whether a video shows the colour, object and direction of its caption.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        prompt: as in ``a red square moves left over the fog``.

    Returns:
        Verdicts by name, each from 0 to 1; empty for a prompt that is no such caption.

    Example:
        >>> import torch
        >>> from visattn.metrics.caption_scorer import caption_scorer
        >>> caption_scorer(torch.zeros(5, 64, 64, 3), "a cat")
        {}
    """
    try:
        parse_caption(prompt)
    except ValueError:
        return {}
    score = score_prompt(frames.permute(0, 3, 1, 2), prompt)
    return {"colour": score.colour, "object": score.object, "direction": score.direction}


# By the names in visattn_shapes.json. A fixed table: the file of a model cannot import code.
SCORERS: Mapping[str, Callable[[torch.Tensor, str], Mapping[str, float]]] = {
    "captions": caption_scorer,
}
