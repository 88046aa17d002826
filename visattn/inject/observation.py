"""What ``observe`` passes to an observer for each attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from visattn.geometry.layout import TokenLayout, valid_keys

__all__ = ["Observation", "Observer"]


@dataclass(frozen=True)
class Observation:
    """An attention call that is about to be computed.

    Args:
        role: name of the denoiser in its pipeline.
        layer: path of the attention module in the denoiser.
        number: index of the module among the attention layers of the denoiser.
        step: index of the denoising step, from 0; None if it is not known.
        steps: number of denoising steps; None if it is not known.
        passes: the pass of each equal part of the batch; None if it is not known.
        q: queries ``[B, H, L, D]``, a tensor of the model: do not change it.
        k: keys ``[B, Hk, L, D]``, likewise.
        v: values ``[B, Hk, L, D]``, likewise.
        layout: layout of the tokens.
        scale: factor of the logits. None means ``D ** -0.5``.
        text_lengths: valid tokens of each text, int64 ``[B, texts]``; no query attends to the
            others. None: all tokens are valid.

    Example:
        >>> from visattn.inject import observe
        >>> calls = []
        >>> with observe(pipe, calls.append, ["blocks.0.attn1"]):
        ...     video = pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
        >>> call = calls[0]
        >>> call.layer, call.step, call.steps, call.passes
        ('blocks.0.attn1', 0, 1, ('cond',))
        >>> call.q.shape[2] == call.layout.length
        True
    """

    role: str
    layer: str
    number: int
    step: int | None
    steps: int | None
    passes: tuple[str, ...] | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    scale: float | None
    text_lengths: torch.Tensor | None = field(default=None, kw_only=True)

    def valid(self, sample: int) -> torch.Tensor | None:
        """Return which keys of a sample are valid, bool ``[L]``; None: all.

        Args:
            sample: index in the batch.
        """
        if self.text_lengths is None:
            return None
        return valid_keys(self.text_lengths[sample : sample + 1], self.layout)[0]


Observer = Callable[[Observation], None]
