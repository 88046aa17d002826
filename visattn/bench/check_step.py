"""Checks of a denoising step before it is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from visattn.bench.denoising_step import Attend, Denoising, watch
from visattn.bench.measure_attention import WrongResult, check
from visattn.geometry.layout import TokenLayout
from visattn.inject.layers.call import Call
from visattn.inject.layers.head_groups import is_dense
from visattn.inject.layers.layer import Layer
from visattn.inject.layers.measured import executed
from visattn.patterns import HeadPattern, Pattern, Skip
from visattn.plan import ANY, Plan

__all__ = ["Checked", "check_step"]


class Checked(NamedTuple):
    """Facts about a checked step; the fields have the same meaning as in ``StepTime``."""

    layout: TokenLayout
    density: float | None
    notes: tuple[str, ...]


def check_step(denoising: Denoising, plan: Plan) -> Checked:
    """Run the checks of ``time_step``.

    Raises:
        WrongResult: a check failed.
    """
    dense = denoising.step()
    noise = float((denoising.step() - dense).abs().max())
    watched = denoising.watched(watch(denoising, None, _pass_on))
    error = float((watched - dense).abs().max())
    if not error <= noise:
        raise WrongResult(
            f"a step without a plan differs by {error:.2e} when its attention calls are watched, "
            f"where {noise:.2e} is allowed; it is not timed"
        )
    checker = CallChecker()
    attachment = watch(denoising, plan, checker.around)
    denoising.watched(attachment)
    reasons = Counter(layer.reason for layer in attachment.layers if layer.reason is not None)
    return Checked(
        layout=TokenLayout.from_tokens(attachment.latest),
        density=mean(checker.densities),
        notes=tuple(f"{count} layers: {reason}" for reason, count in reasons.items()),
    )


def _pass_on(layer: Layer, attend: Attend, *arguments: Any) -> torch.Tensor:
    return attend(*arguments)


class CallChecker:
    """Collects the densities of the calls of a step, and compares the output of each static pattern
    with exact attention once."""

    def __init__(self) -> None:
        self.densities: list[float | None] = []  # one for each call and part of its batch
        self._checked: dict[Pattern, float] = {}  # densities of the patterns that were checked

    def around(
        self,
        layer: Layer,
        attend: Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        *rest: Any,
    ) -> torch.Tensor:
        """Run a call of attention and check its result."""
        before = layer.sparse_calls
        out = attend(query, key, value, call, *rest)
        if layer.sparse_calls == before:
            self.densities.append(1.0)
            return out
        tensors = [query, key, value, out]
        if not call.heads_first:
            tensors = [x.transpose(1, 2) for x in tensors]
        moments = layer.denoising.moments(len(query))
        lengths = layer.lengths(query, call)
        for number, (phase, pass_) in enumerate(moments):
            heads = layer.table.get((phase, pass_)) or layer.table.get((phase, ANY), ())
            sample = number * len(query) // len(moments)
            part = slice(sample, sample + 1)
            texts = None if lengths is None else lengths[part]
            kept = [
                self._density(layer, pattern, [x[part, head : head + 1] for x in tensors], texts)
                for head, pattern in enumerate(heads)
            ]
            self.densities.append(mean(kept) if kept else 1.0)
        return out

    def _density(
        self,
        layer: Layer,
        pattern: HeadPattern,
        tensors: list[torch.Tensor],
        text_lengths: torch.Tensor | None,
    ) -> float | None:
        """Return the density of a pattern, and check its result on one head if it is new.

        Args:
            layer: the layer that ran.
            pattern: the pattern of the head.
            tensors: queries, keys, values and output of the head, ``[1, 1, L, D]``.
            text_lengths: valid text tokens, ``[1, texts]``, or None.
        """
        if not isinstance(pattern, Pattern):
            return executed(layer, pattern)
        if pattern not in self._checked:
            layout = layer.denoising.layout
            self._checked[pattern] = pattern.density(layout)
            if not isinstance(pattern, Skip) and not is_dense(pattern, layout):
                q, k, v, out = tensors
                check(out, q, k, v, pattern, layout, text_lengths)
        return self._checked[pattern]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if one of the values is None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
