"""The attention calls of dense generations that a search looks at, sample by sample."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.inject import Observation
from visattn.readout import ANY_PASS

__all__ = ["AttentionSample", "SamplePlace", "calls_of", "spread_steps"]


class SamplePlace(NamedTuple):
    """A layer's call of a generation: ``number`` counts the layers of its denoiser."""

    role: str
    number: int
    pass_: str
    step: int


class AttentionSample(NamedTuple):
    """One sample of a call: ``q [H, L, D]``, ``k, v [Hk, L, D]``; valid tokens of each text, int64
    ``[1, texts]``, or None."""

    place: SamplePlace
    layer: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    scale: float
    text_lengths: torch.Tensor | None = None

    @property
    def valid(self) -> torch.Tensor | None:
        """The keys that are seen, bool ``[L]``; None: all."""
        return None if self.text_lengths is None else valid_keys(self.text_lengths, self.layout)[0]


def calls_of(observation: Observation, steps: Collection[int]) -> Iterator[AttentionSample]:
    """The calls of an observation at some steps, one of each pass.

    Raises:
        ValueError: its step is not known.
    """
    if observation.step is None:
        raise ValueError(
            f"the denoising step of a call of {observation.role} is not known, so that the search "
            "cannot tell steps apart; give the pipeline and not its denoiser"
        )
    if observation.step not in steps:
        return
    scale = observation.q.shape[3] ** -0.5 if observation.scale is None else observation.scale
    passes = observation.passes or (ANY_PASS,)
    each = observation.q.shape[0] // len(passes)
    lengths = observation.text_lengths
    for number, pass_ in enumerate(passes):
        own = number * each  # of several samples with one noise each, the first speaks for all
        place = SamplePlace(observation.role, observation.number, pass_, observation.step)
        yield AttentionSample(
            place,
            observation.layer,
            observation.q[own],
            observation.k[own],
            observation.v[own],
            observation.layout,
            scale,
            None if lengths is None else lengths[own : own + 1],
        )


def spread_steps(steps: int, count: int) -> tuple[int, ...]:
    """``count`` steps out of ``steps``, in the middles of equal parts."""
    count = min(count, steps)
    return tuple((2 * n + 1) * steps // (2 * count) for n in range(count))
