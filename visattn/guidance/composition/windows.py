"""Windows of one length over a longer sequence of latent frames, which overlap and are blended."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Windows"]


@dataclass(frozen=True)
class Windows:
    """Where the segments of a sequence lie.

    Args:
        segments: the segment of each sample, from 0 on without gaps; samples may have the same.
        length: of each, in latent frames.
        overlap: frames that neighbours have in common, fewer than ``length``.
        axis: of the frames in latents, whose axis 0 are the samples.
    """

    segments: tuple[int, ...]
    length: int
    overlap: int
    axis: int

    @property
    def total(self) -> int:
        """Latent frames of the sequence."""
        return self.length + max(self.segments) * (self.length - self.overlap)

    def weights(self) -> torch.Tensor:
        """What the frames of each sample count for in the sequence, float64 ``[samples, length]``:
        ``min(x, 2 - x)`` with ``x = (i + 0.5) 2 / length`` for its frame ``i``, over the sum of all
        samples that have the frame (DiTCtrl, Cai et al. 2024, arXiv 2412.18597)."""
        x = (torch.arange(self.length, dtype=torch.float64) + 0.5) * 2 / self.length
        own = torch.minimum(x, 2 - x)
        total = torch.zeros(self.total, dtype=torch.float64)
        for place in self._places():
            total[place] += own
        return torch.stack([own / total[place] for place in self._places()])

    def split(self, sequence: torch.Tensor) -> torch.Tensor:
        """The samples of a sequence: ``[1, ...]`` to ``[samples, ...]``."""
        own = [sequence.narrow(self.axis, at.start, self.length) for at in self._places()]
        return torch.cat(own)

    def join(self, samples: torch.Tensor) -> torch.Tensor:
        """The sequence that samples make, blended where they overlap: ``[samples, ...]`` to ``[1,
        ...]``, of their dtype; added up in float32, or float64 for float64. A frame that only one
        sample has is that sample's, to the bit."""
        shape = [1, *samples.shape[1:]]
        shape[self.axis] = self.total
        wide = torch.promote_types(samples.dtype, torch.float32)
        out = torch.zeros(shape, dtype=wide, device=samples.device)
        weights = self.weights().to(out)
        along = [1] * samples.ndim
        along[self.axis] = self.length
        for number, at in enumerate(self._places()):
            part = out.narrow(self.axis, at.start, self.length)
            part += samples[number : number + 1] * weights[number].reshape(along)
        return out.to(samples.dtype)

    def _places(self) -> list[slice]:
        step = self.length - self.overlap
        return [slice(n * step, n * step + self.length) for n in self.segments]
