"""What ``observe`` shows of an attention call."""

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
        role, layer, number: of the denoiser, the path of the attention module in it, and its number
            among the denoiser's attention layers.
        step, steps: of the denoising loop, from 0; None where they are not known.
        passes: the pass of each equal part of the batch; None where it is not known.
        q: ``[B, H, L, D]``; k, v: ``[B, Hk, L, D]``. They are the model's own tensors: look only.
        layout: what the tokens are.
        scale: of the logits; None is ``D ** -0.5``.
        text_lengths: valid tokens of each text, int64 ``[B, texts]``, whose others no query sees;
            None: all are.
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
        """The keys that a sample has, bool ``[L]``; None: all."""
        if self.text_lengths is None:
            return None
        return valid_keys(self.text_lengths[sample : sample + 1], self.layout)[0]


Observer = Callable[[Observation], None]
