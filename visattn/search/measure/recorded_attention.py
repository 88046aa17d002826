"""The attention calls of dense generations that a search reads, one sample at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.inject import Observation
from visattn.readout import ANY_PASS

__all__ = ["AttentionSample", "SamplePlace", "calls_of", "spread_steps"]


class SamplePlace(NamedTuple):
    """Which attention call of a generation a sample comes from.

    Attributes:
        role: of the denoiser.
        number: of the layer in its denoiser.
        pass_: of the guidance, as ``"cond"``.
        step: the denoising step.
    """

    role: str
    number: int
    pass_: str
    step: int


class AttentionSample(NamedTuple):
    """One sample of an attention call.

    Attributes:
        place: which call it is.
        layer: path of the layer's module.
        q: queries ``[H, L, D]``.
        k: keys ``[Hk, L, D]``.
        v: values ``[Hk, L, D]``.
        layout: the layout of the tokens.
        scale: factor of the logits.
        text_lengths: number of valid tokens of each text, int64 ``[1, texts]``; None: all are.
    """

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
        """The keys that are attended to, bool ``[L]``; None: all."""
        return None if self.text_lengths is None else valid_keys(self.text_lengths, self.layout)[0]


def calls_of(observation: Observation, steps: Collection[int]) -> Iterator[AttentionSample]:
    """Yield one sample of each pass of an observed call, if its step is one of the steps.

    Args:
        observation: the observed call.
        steps: the denoising steps to read.

    Raises:
        ValueError: the step of the call is not known.
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
        index = number * each  # the first of the samples of a pass represents all of them
        place = SamplePlace(observation.role, observation.number, pass_, observation.step)
        yield AttentionSample(
            place,
            observation.layer,
            observation.q[index],
            observation.k[index],
            observation.v[index],
            observation.layout,
            scale,
            None if lengths is None else lengths[index : index + 1],
        )


def spread_steps(steps: int, count: int) -> tuple[int, ...]:
    """Return ``count`` of ``steps`` steps: the middles of equal parts."""
    count = min(count, steps)
    return tuple((2 * n + 1) * steps // (2 * count) for n in range(count))
