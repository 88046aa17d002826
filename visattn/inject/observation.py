"""What ``observe`` shows of an attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from visattn.layout import TokenLayout

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


Observer = Callable[[Observation], None]
