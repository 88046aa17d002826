"""Edits of the queries before attention: blurred, replaced, or scaled by a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch

from visattn._arguments import as_indices, check_count, check_number
from visattn.geometry.layout import on_cpu
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State, Stream

__all__ = ["BlurQueries", "ProportionalAttention", "ReplaceQueries", "Temperature"]

INFINITE = 9999.0


@dataclass(frozen=True, kw_only=True)
class BlurQueries(Edit):
    """Queries of the grid are blurred by a Gaussian, after their norm and rotary embedding
    (smoothed energy guidance, Hong 2024, arXiv 2408.00760). Text rows stay.

    Args:
        sigma: standard deviation in tokens; 0 changes nothing; above 9999 every query is the mean
            of all of its grid. The kernel has ``ceil(6 sigma)`` taps, made odd, and reflects at the
            borders, as often as it has to.
        axes: the axes that are blurred, of ``thw``.
        whole_kernel: whether the kernel keeps all of its taps on an axis that is shorter. By
            default it has at most as many as the axis has tokens, or one more where that is even.

    Source:
        Hong (2024), "Smoothed Energy Guidance", arXiv 2408.00760. Code:
        github.com/SusungHong/SEG-SDXL (commit cf8256d).
    Default:
        code. ``whole_kernel=True`` is the Gaussian of the paper.
    Differences:
        - On a grid that is not square each axis limits its own taps; the code takes the width for
          both.
        - The axis of frames is blurred too; the code is for images.
    """

    sigma: float
    example: ClassVar[str] = "BlurQueries(sigma=2.0, layers=[3], passes=['uncond'])"
    axes: str = "thw"
    whole_kernel: bool = False
    stage: ClassVar[str] = "query"
    streams: ClassVar[tuple[Stream, ...]] = ("all", "image")

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "a number of tokens from 0 on"
        check_number("BlurQueries", "sigma", self.sigma, allowed, lambda own: own >= 0)
        if not self.axes or not set(self.axes) <= set("thw"):
            raise ValueError(f"BlurQueries(axes={self.axes!r}) must be some of t, h and w")

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.sigma == 0:
            return
        rows, (_, grid) = state.image, state.call.layout.grids[0]
        own = state.q[:, :, rows]
        if self.sigma > INFINITE and set(self.axes) == set("thw"):
            blurred = own.mean(2, keepdim=True).expand_as(own)
        else:
            blurred = own.unflatten(2, grid.shape)
            for axis, size in zip("thw", grid.shape, strict=True):
                if axis in self.axes:
                    matrix = blur_matrix(size, self.sigma, self.whole_kernel).to(own)
                    at = 2 + "thw".index(axis)
                    blurred = (blurred.movedim(at, -1) @ matrix.mT).movedim(-1, at)
            blurred = blurred.flatten(2, 4)
        new = state.q.clone()
        new[:, :, rows] = blurred
        self.change(state, "q", new, strength)


def _odd(count: int) -> int:
    return count + (count % 2 == 0)


@lru_cache(maxsize=256)
@on_cpu
def blur_matrix(size: int, sigma: float, whole_kernel: bool) -> torch.Tensor:
    """A Gaussian blur of a line with reflected borders as a matrix, float64 ``[size, size]``."""
    if sigma > INFINITE:
        return torch.full((size, size), 1 / size, dtype=torch.float64)
    taps = _odd(math.ceil(6 * sigma))
    half = (taps if whole_kernel else min(taps, _odd(size))) // 2
    at = torch.arange(-half, half + 1)
    weights = (-0.5 * (at.double() / sigma) ** 2).exp()
    weights = weights / weights.sum()
    period = max(1, 2 * (size - 1))
    place = (torch.arange(size)[:, None] + at) % period
    place = torch.where(place >= size, period - place, place)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(
        1, place, weights.expand(size, -1)
    )


@dataclass(frozen=True, kw_only=True)
class Temperature(Edit):
    """Logits are divided by a temperature: below 1 attention is sharper, above 1 flatter (entropy
    rectifying guidance, Berrada Ifriqi et al. 2025, arXiv 2504.13987; TACA, Lv et al. 2025, arXiv
    2506.07986, which multiplies the logits of the image's attention to text by more than 1).

    Args:
        temperature: above 0; 1 changes nothing.
        keys: of which keys: ``all``, ``text`` or ``image``. With ``stream`` this limits it to one
            kind of pair, as image rows to text keys.

    Source:
        Berrada Ifriqi et al. (2025), "Entropy Rectifying Guidance", arXiv 2504.13987; Lv et al.
        (2025), "TACA: Rethinking Cross-Modal Interaction in Multimodal Diffusion Transformers",
        arXiv 2506.07986.
    Default:
        paper.
    Differences:
        - It is the change of the logits alone; windows of steps and layers are the caller's.
    """

    temperature: float
    keys: Literal["all", "text", "image"] = "all"
    example: ClassVar[str] = "Temperature(temperature=0.9, layers=[3])"
    stage: ClassVar[str] = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed, own = "above 0; 1 is no change", self.temperature
        check_number("Temperature", "temperature", own, allowed, lambda t: 0 < t < math.inf)
        if self.keys not in ("all", "text", "image"):
            raise ValueError(f"Temperature(keys={self.keys!r}) must be all, text or image")
        if self.attention == "cross" and self.keys == "image":
            raise ValueError("Temperature(keys='image'): the keys of cross-attention are text")

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.temperature == 1:
            return
        if self.keys == "all" or state.call.kind == "cross":
            self.change(state, "q", state.q / self.temperature, strength)
            return
        segments = state.texts
        if self.keys == "image":
            start, grid = state.call.kv_layout.grids[0]
            segments = ((start, start + grid.numel),)
        if not segments:
            raise ValueError(
                f"Temperature(keys='text') has no text keys at {state.call.layer}; for a model "
                "with cross-attention give attention='cross'"
            )
        counted = sum(rows.stop - rows.start for rows in [state.image, *state.rows("text")])
        if self.stream != "all" and counted != state.q.shape[2]:
            raise ValueError(
                f"Temperature(keys={self.keys!r}, stream={self.stream!r}): {state.call.layer} has "
                "tokens that are neither the text nor the first image, whose rows it cannot leave "
                "as they are; take stream='all' or keys='all'"
            )
        factor = torch.ones(state.q.shape[0], state.q.shape[1], dtype=torch.float64)
        factor[self.samples_in(state)] = 1 + strength.double() * (1 / self.temperature - 1)
        for first, end in segments:
            state.gains.append((self.stream, first, end, factor))


@dataclass(frozen=True, kw_only=True)
class ReplaceQueries(Edit):
    """Queries of samples are those of another sample of the batch (motion style, Chen et al. 2024,
    MotionCLR, arXiv 2410.18977; with ``stream`` a part of the rows).

    Args:
        source: the sample whose queries ``samples`` get.

    Source:
        Chen et al. (2024), "MotionCLR", arXiv 2410.18977.
    Default:
        paper.
    Differences:
        - The paper is for motion of the human body; here rows are tokens of a video.
    """

    source: int
    stage: ClassVar[str] = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_indices("ReplaceQueries(source=...)", self.source)

    def apply(self, state: State, strength: torch.Tensor) -> None:
        source = self.source
        self.check_source(state, source)
        new = state.q[source : source + 1].expand_as(state.q)
        self.change(state, "q", new, strength)


@dataclass(frozen=True, kw_only=True)
class ProportionalAttention(Edit):
    """Logits are multiplied by the root of ``log N / log N0`` for ``N`` keys, as the entropy of
    attention grows with their number (Jin et al. 2023, arXiv 2306.08645; Lumina-T2X, Gao et al.
    2024, arXiv 2405.05945).

    Args:
        trained: ``N0``, the keys that there were in training; as many change nothing.

    Source:
        Jin et al. (2023), "Training-free Diffusion Model Adaptation for Variable-Sized
        Text-to-Image Synthesis", arXiv 2306.08645.
    Default:
        paper.
    Differences:
        none
    """

    trained: int
    example: ClassVar[str] = "ProportionalAttention(trained=1024)"
    stage: ClassVar[str] = "query"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ProportionalAttention(trained=...)", self.trained, 2)

    def apply(self, state: State, strength: torch.Tensor) -> None:
        keys = state.k.shape[2]
        if keys not in (1, self.trained):
            factor = math.sqrt(math.log(keys) / math.log(self.trained))
            self.change(state, "q", state.q * factor, strength)
