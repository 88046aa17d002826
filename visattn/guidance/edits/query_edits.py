"""Edits of the queries before attention: blur, replacement, and scaling by a temperature."""

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

INFINITE = 9999.0  # a larger sigma means the mean over the axis


@dataclass(frozen=True, kw_only=True)
class BlurQueries(Edit):
    """Blur the image queries with a Gaussian over the token grid, after their norm and rotary
    embedding (smoothed energy guidance, Hong 2024, arXiv 2408.00760). Text queries stay.

    Args:
        sigma: standard deviation in tokens. 0 changes nothing; above 9999 every query becomes the
            mean of its grid. The kernel has ``ceil(6 sigma)`` taps, plus one if that is even, and
            reflects at the borders, several times if necessary.
        axes: the axes to blur, some of ``thw``.
        whole_kernel: whether the kernel keeps all its taps on an axis with fewer tokens. By default
            it has at most as many taps as the axis has tokens, plus one if that is even.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import BlurQueries, steer
        >>> with steer(pipe, BlurQueries(sigma=2.0, layers=[1], passes=["uncond"])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        check_number("BlurQueries", "sigma", self.sigma, allowed, lambda sigma: sigma >= 0)
        if not self.axes or not set(self.axes) <= set("thw"):
            raise ValueError(f"BlurQueries(axes={self.axes!r}) must be some of t, h and w")

    def apply(self, state: State, strength: torch.Tensor) -> None:
        if self.sigma == 0:
            return
        rows, (_, grid) = state.image, state.call.layout.grids[0]
        queries = state.q[:, :, rows]
        if self.sigma > INFINITE and set(self.axes) == set("thw"):
            blurred = queries.mean(2, keepdim=True).expand_as(queries)
        else:
            blurred = queries.unflatten(2, grid.shape)
            for axis, size in zip("thw", grid.shape, strict=True):
                if axis in self.axes:
                    matrix = blur_matrix(size, self.sigma, self.whole_kernel).to(queries)
                    dim = 2 + "thw".index(axis)
                    blurred = (blurred.movedim(dim, -1) @ matrix.mT).movedim(-1, dim)
            blurred = blurred.flatten(2, 4)
        new = state.q.clone()
        new[:, :, rows] = blurred
        self.change(state, "q", new, strength)


def _odd(count: int) -> int:
    """Return the count, plus one if it is even."""
    return count + (count % 2 == 0)


@lru_cache(maxsize=256)
@on_cpu
def blur_matrix(size: int, sigma: float, whole_kernel: bool) -> torch.Tensor:
    """Return the matrix of a Gaussian blur along an axis with reflected borders.

    Args:
        size: number of tokens of the axis.
        sigma: standard deviation in tokens.
        whole_kernel: whether the kernel may have more taps than the axis has tokens.

    Returns:
        The matrix, float64 ``[size, size]``. Its rows sum to 1.
    """
    if sigma > INFINITE:
        return torch.full((size, size), 1 / size, dtype=torch.float64)
    taps = _odd(math.ceil(6 * sigma))
    half = (taps if whole_kernel else min(taps, _odd(size))) // 2
    offsets = torch.arange(-half, half + 1)
    weights = (-0.5 * (offsets.double() / sigma) ** 2).exp()
    weights = weights / weights.sum()
    period = max(1, 2 * (size - 1))
    positions = (torch.arange(size)[:, None] + offsets) % period
    positions = torch.where(positions >= size, period - positions, positions)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(
        1, positions, weights.expand(size, -1)
    )


@dataclass(frozen=True, kw_only=True)
class Temperature(Edit):
    """Divide the logits by a temperature: below 1 attention becomes sharper, above 1 flatter
    (entropy rectifying guidance, Berrada Ifriqi et al. 2025, arXiv 2504.13987; TACA, Lv et al.
    2025, arXiv 2506.07986, which multiplies the logits of the image's attention to text by more
    than 1).

    Args:
        temperature: the divisor, above 0. 1 changes nothing.
        keys: the keys whose logits change: ``all``, ``text`` or ``image``. Together with ``stream``
            this selects one kind of pair, such as image queries and text keys.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, the layer has no such
            keys or rows.

    Example:
        >>> from visattn.guidance import Temperature, steer
        >>> with steer(pipe, Temperature(temperature=0.9, layers=[1])):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
        value, allowed = self.temperature, "above 0; 1 changes nothing"
        check_number("Temperature", "temperature", value, allowed, lambda t: 0 < t < math.inf)
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
                f"Temperature(keys='text'): {state.call.layer} has no text keys; for a model with "
                "cross-attention use attention='cross'"
            )
        counted = sum(rows.stop - rows.start for rows in [state.image, *state.rows("text")])
        if self.stream != "all" and counted != state.q.shape[2]:
            raise ValueError(
                f"Temperature(keys={self.keys!r}, stream={self.stream!r}): {state.call.layer} has "
                "tokens that belong neither to the text nor to the first image, whose rows would "
                "change too; use stream='all' or keys='all'"
            )
        factor = torch.ones(state.q.shape[0], state.q.shape[1], dtype=torch.float64)
        factor[self.samples_in(state)] = 1 + strength.double() * (1 / self.temperature - 1)
        for first, end in segments:
            state.gains.append((self.stream, first, end, factor))


@dataclass(frozen=True, kw_only=True)
class ReplaceQueries(Edit):
    """Replace the queries of samples by those of another sample of their pass (motion style, Chen
    et al. 2024, MotionCLR, arXiv 2410.18977). ``stream`` limits it to a part of the rows.

    Args:
        source: index of the sample whose queries the ``samples`` get.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; or, at an attention call, a pass has no such
            sample.

    Example:
        >>> from visattn.guidance import ReplaceQueries, steer
        >>> with steer(pipe, ReplaceQueries(source=0, samples=[1])):
        ...     videos = pipe(["a red cat", "a blue cat"], height=16, width=16, num_frames=5,
        ...                   num_inference_steps=1)

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
    """Multiply the logits by ``sqrt(log N / log N0)`` for ``N`` keys, to keep the entropy of
    attention when the number of keys changes (Jin et al. 2023, arXiv 2306.08645; Lumina-T2X, Gao et
    al. 2024, arXiv 2405.05945).

    Args:
        trained: ``N0``, the number of keys in training. A call with as many keys does not change.

    The other arguments are those of ``Edit``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> from visattn.guidance import ProportionalAttention, steer
        >>> with steer(pipe, ProportionalAttention(trained=1024)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

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
