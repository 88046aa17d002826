"""CFG-Zero*: classifier-free guidance with a scaled unconditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn._arguments import is_number
from visattn.guidance.written_form import Writable

__all__ = ["CFGZeroStar"]


@dataclass(frozen=True)
class CFGZeroStar(Writable):
    """CFG-Zero* for flow matching: the unconditional prediction is scaled by
    ``s = <c, u> / |u|^2``, and the first steps predict 0 (Fan et al. 2025, arXiv 2503.18886). It
    needs no further pass. With a guidance by a perturbed pass, ``w (c - p)`` is added.

    Args:
        zero_init: the first steps, which predict 0: their number as an int, or a share of the steps
            as a float. ``zero_steps=n`` of the authors is ``zero_init=n + 1``.

    Raises:
        ValueError: ``zero_init`` is out of range.

    Example:
        >>> from visattn.guidance import CFGZeroStar, guide
        >>> with guide(pipe, CFGZeroStar(zero_init=0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Fan et al. (2025), "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching Models",
        arXiv 2503.18886. Code: github.com/WeichenFan/CFG-Zero-star (commit 3162be1).
    Default:
        code. ``zero_init=1`` is the default of its function.
    Differences:
        - Its scripts for Wan and HunyuanVideo predict 0 in two steps, which is ``zero_init=2``.
    """

    zero_init: int | float = 1
    example: ClassVar[str] = "CFGZeroStar(zero_init=1)"

    def __post_init__(self) -> None:
        value = self.zero_init
        if not is_number(value) or value < 0 or (isinstance(value, float) and value > 1):
            raise ValueError(
                f"CFGZeroStar(zero_init={value!r}) must be a number of steps, or a share of the "
                "steps from 0.0 to 1.0"
            )
