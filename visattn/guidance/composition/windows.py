"""Overlapping windows of one length in a longer sequence of latent frames, and their blend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """The segments of a sequence, as windows of latent frames.

    Args:
        segments: segment of each sample, from 0 on without gaps. Several samples may have the same
            segment.
        length: length of a segment, in latent frames.
        overlap: number of latent frames that neighbours share, less than ``length``.
        axis: axis of the frames in latents. Axis 0 has the samples.
    """

    segments: tuple[int, ...]
    length: int
    overlap: int
    axis: int

    @property
    def total(self) -> int:
        """Number of latent frames of the sequence."""
        return self.length + max(self.segments) * (self.length - self.overlap)

    def weights(self) -> torch.Tensor:
        """Return the blend weights of the frames of each sample, float64 ``[samples, length]``:
        ``min(x, 2 - x)`` with ``x = (i + 0.5) 2 / length`` for frame ``i``, divided by the sum over
        all samples that have the frame (DiTCtrl, Cai et al. 2024, arXiv 2412.18597)."""
        x = (torch.arange(self.length, dtype=torch.float64) + 0.5) * 2 / self.length
        triangle = torch.minimum(x, 2 - x)
        total = torch.zeros(self.total, dtype=torch.float64)
        for window in self._windows():
            total[window] += triangle
        return torch.stack([triangle / total[window] for window in self._windows()])

    def split(self, sequence: torch.Tensor) -> torch.Tensor:
        """Return the samples of a sequence: ``[1, ...]`` to ``[samples, ...]``.

        Args:
            sequence: latents of the sequence.
        """
        starts = [window.start for window in self._windows()]
        return torch.cat([sequence.narrow(self.axis, start, self.length) for start in starts])

    def join(self, samples: torch.Tensor) -> torch.Tensor:
        """Blend samples into a sequence: ``[samples, ...]`` to ``[1, ...]``, of the same dtype. The
        sums are in float32 (float64 for float64). A frame that only one sample has is copied
        exactly.

        Args:
            samples: latents of the samples.
        """
        shape = [1, *samples.shape[1:]]
        shape[self.axis] = self.total
        acc_dtype = torch.promote_types(samples.dtype, torch.float32)
        out = torch.zeros(shape, dtype=acc_dtype, device=samples.device)
        weights = self.weights().to(out)
        weight_shape = [1] * samples.ndim
        weight_shape[self.axis] = self.length
        for sample, window in enumerate(self._windows()):
            part = out.narrow(self.axis, window.start, self.length)
            part += samples[sample : sample + 1] * weights[sample].reshape(weight_shape)
        return out.to(samples.dtype)

    def _windows(self) -> list[slice]:
        """Return the latent frames of each sample."""
        step = self.length - self.overlap
        return [slice(n * step, n * step + self.length) for n in self.segments]
