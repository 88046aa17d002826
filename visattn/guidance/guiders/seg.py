"""SEG: guidance by a pass with blurred queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.query_edits import INFINITE, BlurQueries
from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.head_set import Layers

__all__ = ["SEG"]


@dataclass(frozen=True, kw_only=True)
class SEG(Guidance):
    """Smoothed energy guidance: the further pass has blurred queries (Hong 2024, arXiv
    2408.00760).

    Args:
        layers: numbers or module paths of attention layers; None means all.
        sigma: standard deviation of the blur in tokens. The default is infinite: every query is the
            mean query.
        whole_kernel: whether the blur keeps all its taps on short axes, as of BlurQueries.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import SEG, guide
        >>> with guide(pipe, SEG(layers=[1], sigma=2.0, scale=3.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Hong (2024), "Smoothed Energy Guidance", arXiv 2408.00760. Code:
        github.com/SusungHong/SEG-SDXL (commit cf8256d).
    Default:
        code.
    Differences:
        - On a grid that is not square each axis limits its own taps; the code takes the width for
          both.
        - The axis of frames is blurred too; the code is for images.
    """

    layers: Layers = None
    sigma: float = INFINITE + 1
    whole_kernel: bool = False
    example: ClassVar[str] = "SEG(layers=[3], sigma=2.0, scale=3.0)"

    def edits(self) -> list[Edit | BlockEdit]:
        return [BlurQueries(layers=self.layers, sigma=self.sigma, whole_kernel=self.whole_kernel)]
