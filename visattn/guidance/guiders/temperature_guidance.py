"""Guidance by a pass with another temperature of the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.query_edits import Temperature
from visattn.guidance.guiders.guidance import Guidance
from visattn.guidance.head_set import Layers

__all__ = ["TemperatureGuidance"]


@dataclass(frozen=True, kw_only=True)
class TemperatureGuidance(Guidance):
    """Temperature guidance: the further pass has another temperature of the softmax, as the image
    part of entropy rectifying guidance (Berrada Ifriqi et al. 2025, arXiv 2504.13987).

    Args:
        layers: numbers or module paths of attention layers; None means all.
        temperature: of the softmax in the further pass; above 1 attention is flatter, below 1 it is
            sharper.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import TemperatureGuidance, guide
        >>> with guide(pipe, TemperatureGuidance(layers=[1], temperature=2.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Berrada Ifriqi et al. (2025), "Entropy Rectifying Guidance", arXiv 2504.13987.
    Default:
        paper. No code is known.
    Differences:
        - Only the part for the image is implemented; the part in the text encoder is not.
        - All layers and steps have the same temperature; the paper picks layers and a first step.
    """

    layers: Layers = None
    temperature: float = 2.0
    example: ClassVar[str] = "TemperatureGuidance(layers=[3], temperature=2.0, scale=3.0)"

    def edits(self) -> list[Edit | BlockEdit]:
        return [Temperature(layers=self.layers, temperature=self.temperature)]
