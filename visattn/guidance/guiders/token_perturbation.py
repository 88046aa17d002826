"""Guidance by a pass in which blocks get their tokens in a random order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.shuffle_tokens import ShuffleTokens
from visattn.guidance.guiders.guidance import Guidance

__all__ = ["TokenPerturbation"]


@dataclass(frozen=True, kw_only=True)
class TokenPerturbation(Guidance):
    """Token perturbation guidance: in the further pass blocks get their image tokens in a random
    order (Rajabi et al. 2025, arXiv 2506.10036).

    Args:
        blocks: indices of blocks, in the order in which they run.
        share: share of the tokens that is permuted.
        seed: of the random order.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``blocks`` has another form.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import TokenPerturbation, guide
        >>> with guide(pipe, TokenPerturbation(blocks=[0, 1])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Rajabi et al. (2025), "Token Perturbation Guidance for Diffusion Models", arXiv 2506.10036.
    Default:
        paper. The released code was not compared.
    Differences:
        - The paper names blocks of UNets; the first four blocks are a choice of this project.
    """

    blocks: int | Sequence[int] = (0, 1, 2, 3)
    share: float = 1.0
    seed: int = 0
    example: ClassVar[str] = "TokenPerturbation(blocks=[0, 1], share=0.5, scale=3.0)"

    def edits(self) -> list[Edit | BlockEdit]:
        return [ShuffleTokens(blocks=self.blocks, share=self.share, seed=self.seed)]
