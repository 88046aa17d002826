"""Attention that is as sharp at another size as it was at the one of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_count
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State

__all__ = ["ProportionalAttention"]


@dataclass(frozen=True, kw_only=True)
class ProportionalAttention(Edit):
    """Logits are multiplied by the root of ``log N / log N0`` for ``N`` keys, as the entropy of
    attention grows with their number (Jin et al. 2023, arXiv 2306.08645; Lumina-T2X, Gao et al.
    2024, arXiv 2405.05945).

    Args:
        trained: ``N0``, the keys that there were in training; as many change nothing.

    Source:
        Jin et al. (2023), "Training-free Diffusion Model Adaptation for Variable-Sized
        Text-to-Image Synthesis", arXiv 2306.08645.
    Default:
        paper.
    Differences:
        none
    """

    trained: int
    stage: ClassVar[str] = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ProportionalAttention(trained=...)", self.trained, 2)

    def apply(self, state: State, strength: torch.Tensor) -> None:
        keys = state.k.shape[2]
        if keys not in (1, self.trained):
            factor = math.sqrt(math.log(keys) / math.log(self.trained))
            self.change(state, "q", state.q * factor, strength)
