"""Enhance-A-Video: attention counts for more where frames attend to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State, Stream

__all__ = ["EnhanceVideo", "cross_frame_intensity"]

CHUNK = 1 << 22  # numbers of a tensor that are there at a time


@dataclass(frozen=True, kw_only=True)
class EnhanceVideo(Edit):
    """The attention of the video's rows is multiplied by ``max(1, CFI (T + weight))``, ``CFI``
    being how much frames attend to each other (Enhance-A-Video, Luo et al. 2025, arXiv
    2502.07508). Text rows stay, and so does an image, whose ``T`` is 1. No further pass.

    The gain is one number for each sample and call, over all heads and sites, as in the authors'
    code, which takes one for a whole batch and puts it behind the output projection, so that it
    scales the bias of that too.

    Args:
        weight: the authors' for CogVideoX is 3.4, for HunyuanVideo 4, for Wan 4; from ``-T`` on the
            gain is 1.

    Source:
        Luo et al. (2025), "Enhance-A-Video", arXiv 2502.07508. Code:
        github.com/NUS-HPC-AI-Lab/Enhance-A-Video (commit 16a7899).
    Default:
        code.
    Differences:
        - The gain is one for each sample; the code takes one for a whole batch.
        - The gain is put on the output of attention; the code puts it behind the output projection
          and its bias.
    """

    weight: float = 4.0
    stream: Stream = "image"
    example: ClassVar[str] = "EnhanceVideo(weight=4.0)"
    stage: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weight, (int, float)) or not math.isfinite(self.weight):
            raise ValueError(f"EnhanceVideo(weight={self.weight!r}) must be a finite number")
        if self.attention != "self":
            raise ValueError(
                "EnhanceVideo(attention='cross') is not possible: the keys of cross-attention are "
                "not frames; take attention='self'"
            )
        if self.stream != "image":
            raise ValueError(
                f"EnhanceVideo(stream={self.stream!r}) is not possible: it is of the video's rows "
                "alone; leave stream out"
            )

    def apply(self, state: State, strength: torch.Tensor) -> None:
        _, grid = state.call.layout.grids[0]
        if grid.frames == 1:
            return
        rows = state.image
        q, k = (x[:, :, rows].unflatten(2, (grid.frames, -1)) for x in (state.q, state.k))
        intensity = cross_frame_intensity(q, k, state.call.factor)
        gain = (intensity * (grid.frames + self.weight)).clamp(min=1)
        self.change(state, "out", state.out * gain.to(state.out)[:, None, None, None], strength)


def cross_frame_intensity(q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
    """The mean weight that a frame gives to another one, attention being among the frames of one
    site.

    Args:
        q, k: ``[b, H, T, sites, D]``, at least two frames.
        factor: of the logits.

    Returns:
        ``[b]``, float32 (float64 for float64), over all heads and sites.
    """
    batch, heads, frames, sites, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros(batch, dtype=wide, device=q.device)
    own = torch.eye(frames, dtype=torch.bool, device=q.device)
    step = max(1, CHUNK // (batch * heads * frames * max(frames, dim)))
    for first in range(0, sites, step):
        mine, other = (x[:, :, :, first : first + step].transpose(2, 3).to(wide) for x in (q, k))
        weights = (mine @ other.mT * factor).softmax(-1)
        total += weights.masked_fill(own, 0).sum((1, 2, 3, 4))
    return total / (heads * sites * frames * (frames - 1))
