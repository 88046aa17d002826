"""SLG, STG and S2-Guidance: guidance by a pass that skips blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.skip_block import SkipBlock, SkipRandomBlocks
from visattn.guidance.guiders.guidance import Guidance

__all__ = ["SLG", "STG", "S2Guidance"]


@dataclass(frozen=True, kw_only=True)
class SLG(Guidance):
    """Skip layer guidance: the further pass skips blocks. Defaults are those of SD3.5 medium.

    Args:
        blocks: indices of blocks, in the order in which they run.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``blocks`` has another form.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import SLG, guide
        >>> with guide(pipe, SLG(blocks=[1], start=0, stop=0.5)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Stability AI, the release of Stable Diffusion 3.5 medium; `skip_guidance_layers` of
        diffusers has the same rule.
    Default:
        own. There is no publication; blocks, scale and steps are those of that release.
    Differences:
        none
    """

    start: int | float = 0.01
    stop: int | float = 0.2
    scale: float = 2.8
    blocks: int | Sequence[int] = (7, 8, 9)
    example: ClassVar[str] = "SLG(blocks=[7, 8, 9], scale=2.8, start=0.01, stop=0.2)"

    def edits(self) -> list[Edit | BlockEdit]:
        return [SkipBlock(blocks=self.blocks)]


@dataclass(frozen=True, kw_only=True)
class STG(Guidance):
    """Spatiotemporal skip guidance: the further pass skips blocks, or their attention (Hyung et al.
    2024, arXiv 2411.18664).

    Args:
        blocks: indices of blocks, in the order in which they run. The released pipelines skip these
            whole blocks: 11 of CogVideoX, 2 of HunyuanVideo, 19 of LTX, 34 of Mochi.
        what: what is skipped: ``block`` or ``attention``.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``blocks`` has another form.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import STG, guide
        >>> with guide(pipe, STG(blocks=1, what="attention")):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Hyung et al. (2024), "Spatiotemporal Skip Guidance for Enhanced Video Diffusion Sampling",
        arXiv 2411.18664. Code: github.com/junhahyung/STGuidance (commit f2b7482).
    Default:
        code. The released pipelines skip whole blocks; the paper has ``attention`` too.
    Differences:
        - The code can rescale the guided prediction (by 0.7); this does not.
    """

    scale: float = 1.0
    blocks: int | Sequence[int] = 11
    what: Literal["attention", "block"] = "block"
    example: ClassVar[str] = "STG(blocks=[11], scale=1.0)"

    def edits(self) -> list[Edit | BlockEdit]:
        return [SkipBlock(blocks=self.blocks, what=self.what)]


@dataclass(frozen=True, kw_only=True)
class S2Guidance(Guidance):
    """S2-Guidance: the further pass skips blocks that are drawn again at every step (Chen et al.
    2025, arXiv 2508.12880).

    Args:
        share: share of the blocks that is skipped.
        seed: of the random choice.
        scale: ``w`` of ``w (c - p)``.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import S2Guidance, guide
        >>> with guide(pipe, S2Guidance(share=0.3)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Chen et al. (2025), "S2-Guidance", arXiv 2508.12880.
    Default:
        paper. No code was released.
    Differences:
        - At least one block is skipped.
    """

    scale: float = 1.0
    share: float = 0.1
    seed: int = 0
    example: ClassVar[str] = "S2Guidance(share=0.1, scale=1.0)"

    def edits(self) -> list[Edit | BlockEdit]:
        return [SkipRandomBlocks(share=self.share, seed=self.seed)]
