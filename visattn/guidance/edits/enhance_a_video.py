"""Enhance-A-Video: amplify the attention of videos whose frames attend to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import check_number
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State, Stream

__all__ = ["EnhanceVideo", "cross_frame_intensity"]

CHUNK = 1 << 22  # elements of the largest intermediate tensor


@dataclass(frozen=True, kw_only=True)
class EnhanceVideo(Edit):
    """Multiply the attention output of the video rows by ``max(1, CFI (T + weight))``, where ``T``
    is the number of frames and ``CFI``, the cross-frame intensity, measures how much frames attend
    to each other (Enhance-A-Video, Luo et al. 2025, arXiv 2502.07508). Text rows stay, and so do
    images, which have one frame. No additional denoiser pass is needed.

    The gain is one number for each sample and attention call, over all heads and grid positions.
    The authors' code computes one for a whole batch and applies it after the output projection, so
    that it also scales the bias of that projection.

    Args:
        weight: the weight of the paper. The authors use 3.4 for CogVideoX, and 4 for HunyuanVideo
            and Wan. At ``-T`` and below the gain is 1.
        attention: ``self``, the only allowed value.
        stream: ``image``, the only allowed value.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import EnhanceVideo, steer
        >>> with steer(pipe, EnhanceVideo(weight=4.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        check_number("EnhanceVideo", "weight", self.weight, "a finite number")
        if self.attention != "self":
            raise ValueError(
                "EnhanceVideo(attention='cross') is not possible: the keys of cross-attention are "
                "not frames; use attention='self'"
            )
        if self.stream != "image":
            raise ValueError(
                f"EnhanceVideo(stream={self.stream!r}) is not possible: it changes the video rows "
                "only; leave stream out"
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
    """Return the cross-frame intensity: the mean weight that a frame gives to another one, in an
    attention among the frames of one grid position.

    Args:
        q: queries ``[b, H, T, positions, D]``, with at least two frames.
        k: keys ``[b, H, T, positions, D]``.
        factor: scale of the logits.

    Returns:
        The mean over all heads and grid positions, ``[b]``, float32 (float64 for float64).
    """
    batch, heads, frames, positions, dim = q.shape
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros(batch, dtype=acc_dtype, device=q.device)
    same_frame = torch.eye(frames, dtype=torch.bool, device=q.device)
    step = max(1, CHUNK // (batch * heads * frames * max(frames, dim)))
    for first in range(0, positions, step):
        queries, keys = (
            x[:, :, :, first : first + step].transpose(2, 3).to(acc_dtype) for x in (q, k)
        )
        weights = (queries @ keys.mT * factor).softmax(-1)
        total += weights.masked_fill(same_frame, 0).sum((1, 2, 3, 4))
    return total / (heads * positions * frames * (frames - 1))
