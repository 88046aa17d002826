"""PSNR, SSIM, flicker and largest error of decoded frames, per frame and per clip.

Frames are ``[T, H, W, 3]``, RGB with values in [0, 1], and are best taken before any encoding: an
mp4 adds errors of its own. Everything is computed in float64, one frame at a time.

PSNR is ``10 log10(1 / MSE)`` in dB. A frame's MSE is the mean over its pixels and channels; the
clip's PSNR is that of the MSE of all frames, and not the mean of the PSNR of the frames, which
would be infinite as soon as one frame is equal.

SSIM is the index of Wang, Bovik, Sheikh and Simoncelli (2004, IEEE Trans. Image Processing 13(4),
equation 13) with their Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03 and
population variances. The variant: each of R, G and B on its own instead of luminance, only windows
that lie whole inside the frame, no downsampling, and the mean over windows and channels; the clip's
is the mean over its frames.

Flicker of frame t is the mean over pixels and channels of ``|x[t+1] - 2 x[t] + x[t-1]|``, the
change of the change: a steady brightening has none. The first and the last frame have no value, and
a clip of fewer than three frames none at all; the clip's is the mean over the other frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Comparison", "Scores", "compare_frames", "flicker", "max_error", "psnr", "ssim"]

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


class Scores(NamedTuple):
    """A measure of a clip.

    Attributes:
        clip: of the whole clip; None: not defined.
        frames: of each frame; None: not defined.

    Example:
        >>> from visattn.metrics import Scores
        >>> Scores(30.0, (29.0, 31.0)).clip
        30.0
    """

    clip: float | None
    frames: tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare_frames``.

    Attributes:
        psnr: in dB; infinite for equal clips.
        ssim: in [-1, 1].
        max_error: in [0, 1].
        flicker: of the frames, in [0, 2].
        reference_flicker: of the reference, in [0, 2].

    Example:
        >>> import torch
        >>> from visattn.metrics import compare_frames
        >>> reference = torch.zeros(3, 16, 16, 3)
        >>> round(compare_frames(reference + 0.1, reference).psnr.clip, 3)
        20.0
    """

    psnr: Scores
    ssim: Scores
    max_error: Scores
    flicker: Scores
    reference_flicker: Scores

    @property
    def flicker_ratio(self) -> float | None:
        """Flicker of the frames over that of the reference; None: that is 0 or not defined."""
        flicker, reference = self.flicker.clip, self.reference_flicker.clip
        return None if flicker is None or not reference else flicker / reference

    def numbers(self, *, per_frame: bool = False) -> dict[str, object]:
        """Return all measures as JSON values, with None for an infinite PSNR (``max_error`` is then
        0) and for a flicker that is not defined.

        Args:
            per_frame: whether each frame is listed too.
        """
        names = ("psnr", "ssim", "max_error", "flicker", "reference_flicker")
        scores: dict[str, Scores] = {name: getattr(self, name) for name in names}
        out: dict[str, object] = {name: _finite(score.clip) for name, score in scores.items()}
        out["flicker_ratio"] = self.flicker_ratio
        if per_frame:
            out["per_frame"] = [
                {name: _finite(score.frames[t]) for name, score in scores.items()}
                for t in range(len(self.psnr.frames))
            ]
        return out


def compare_frames(frames: torch.Tensor, reference: torch.Tensor) -> Comparison:
    """Return all measures of a clip against a reference.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        reference: likewise.

    Raises:
        TypeError: one of them holds no floating-point values.
        ValueError: a shape is wrong, the two shapes differ, a value is outside [0, 1], or a frame
            is smaller than 11 x 11 pixels.

    Example:
        >>> import torch
        >>> from visattn.metrics import compare_frames
        >>> frames = torch.rand(4, 16, 16, 3)
        >>> compare_frames(frames, frames).ssim.clip
        1.0
    """
    return Comparison(
        psnr=psnr(frames, reference),
        ssim=ssim(frames, reference),
        max_error=max_error(frames, reference),
        flicker=flicker(frames),
        reference_flicker=flicker(reference),
    )


def psnr(frames: torch.Tensor, reference: torch.Tensor) -> Scores:
    """Return the PSNR in dB; infinite for equal frames.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        reference: likewise.

    Raises:
        TypeError, ValueError: as ``compare_frames``; frames may be smaller.

    Example:
        >>> import torch
        >>> from visattn.metrics import psnr
        >>> round(psnr(torch.full((2, 8, 8, 3), 0.1), torch.zeros(2, 8, 8, 3)).clip, 3)
        20.0
    """
    _check_pair(frames, reference)
    errors = [
        float((a.double() - b.double()).square().mean())
        for a, b in zip(frames, reference, strict=True)
    ]
    return Scores(_decibels(_mean(errors)), tuple(map(_decibels, errors)))


def max_error(frames: torch.Tensor, reference: torch.Tensor) -> Scores:
    """Return the largest absolute difference, in [0, 1].

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        reference: likewise.

    Raises:
        TypeError, ValueError: as ``compare_frames``; frames may be smaller.

    Example:
        >>> import torch
        >>> from visattn.metrics import max_error
        >>> max_error(torch.full((2, 8, 8, 3), 0.5), torch.zeros(2, 8, 8, 3)).clip
        0.5
    """
    _check_pair(frames, reference)
    errors = [
        float((a.double() - b.double()).abs().max()) for a, b in zip(frames, reference, strict=True)
    ]
    return Scores(max(errors), tuple(errors))


def ssim(frames: torch.Tensor, reference: torch.Tensor) -> Scores:
    """Return the SSIM, in [-1, 1]; 1 for equal frames. The module's docstring has the variant.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        reference: likewise.

    Raises:
        TypeError, ValueError: as ``compare_frames``.

    Source:
        Wang, Bovik, Sheikh and Simoncelli (2004), "Image Quality Assessment: From Error Visibility
        to Structural Similarity", IEEE Trans. Image Processing 13(4), equation 13.

    Example:
        >>> import torch
        >>> from visattn.metrics import ssim
        >>> frames = torch.rand(2, 16, 16, 3)
        >>> ssim(frames, frames).clip
        1.0
    """
    _check_pair(frames, reference)
    if min(frames.shape[1:3]) < WINDOW:
        raise ValueError(
            f"frames of {frames.shape[1]}x{frames.shape[2]} pixels are smaller than the window of "
            f"SSIM, {WINDOW}x{WINDOW}"
        )
    values = [_frame_ssim(a.double(), b.double()) for a, b in zip(frames, reference, strict=True)]
    return Scores(_mean(values), tuple(values))


def flicker(frames: torch.Tensor) -> Scores:
    """Return the flicker, in [0, 2]; None for the first and last frame, and for a clip of fewer
    than three frames.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].

    Raises:
        TypeError, ValueError: as ``compare_frames``; frames may be smaller.

    Example:
        >>> import torch
        >>> from visattn.metrics import flicker
        >>> frames = torch.zeros(3, 8, 8, 3)
        >>> frames[1] = 1
        >>> flicker(frames)
        Scores(clip=2.0, frames=(None, 2.0, None))
    """
    _check(frames, "frames")
    inner = [
        float((frames[t + 1].double() - 2 * frames[t].double() + frames[t - 1]).abs().mean())
        for t in range(1, len(frames) - 1)
    ]
    if not inner:
        return Scores(None, (None,) * len(frames))
    return Scores(_mean(inner), (None, *inner, None))


def _frame_ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the SSIM of two frames ``[H, W, 3]``."""
    x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
    maps = torch.cat([x, y, x * x + y * y, x * y])  # [12, H, W]
    offsets = torch.arange(WINDOW, dtype=maps.dtype, device=maps.device) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = (window / window.sum()).tolist()
    maps = _filtered(_filtered(maps, weights).transpose(1, 2), weights).transpose(1, 2)
    mean_x, mean_y, squares, product = maps.split(3)
    variances = squares - mean_x**2 - mean_y**2
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
    structure = (2 * covariance + K2**2) / (variances + K2**2)
    return float((luminance * structure).mean())


def _filtered(maps: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """Filter ``[N, H, W]`` along H where the window lies inside: ``[N, H - 10, W]``. This is a sum
    of slices, because a convolution in float64 takes several times as long on a CPU."""
    rows = maps.shape[1] - WINDOW + 1
    out = maps[:, :rows] * weights[0]
    for offset, weight in enumerate(weights[1:], 1):
        out.add_(maps[:, offset : offset + rows], alpha=weight)
    return out


def _check(frames: torch.Tensor, name: str) -> None:
    if not isinstance(frames, torch.Tensor) or not frames.is_floating_point():
        what = frames.dtype if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise TypeError(f"{name} of {what} must be a floating-point tensor with values in [0, 1]")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"{name} of shape {list(frames.shape)} must be [T, H, W, 3], none empty")
    low, high = (float(value) for value in frames.aminmax())
    if not 0 <= low <= high <= 1:  # false for NaN as well
        raise ValueError(f"{name} holds values from {low:g} to {high:g}; they must be in [0, 1]")


def _check_pair(frames: torch.Tensor, reference: torch.Tensor) -> None:
    _check(frames, "frames")
    _check(reference, "reference")
    if frames.shape != reference.shape:
        raise ValueError(
            f"frames of shape {list(frames.shape)} must have the shape of reference, "
            f"{list(reference.shape)}"
        )


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -10 * math.log10(error)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
