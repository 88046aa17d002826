"""How far two clips are apart, in numbers."""

from __future__ import annotations

from visattn.metrics.frames import (
    Comparison,
    Scores,
    compare_frames,
    flicker,
    max_error,
    psnr,
    ssim,
)

__all__ = ["Comparison", "Scores", "compare_frames", "flicker", "max_error", "psnr", "ssim"]
