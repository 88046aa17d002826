"""The seconds of patterns in a layer, measured on one of its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from visattn.attention import choose_backend, sparse_attention
from visattn.cost import TORCH, DenseAttention, interleaved
from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern

__all__ = ["HeadLatency", "LayerLatency", "heads_run_separately", "measure"]

SPAN = 0.06  # seconds spent on timing one pattern
DENSE = repr(Dense())


class HeadLatency(NamedTuple):
    """Seconds of a pattern.

    Attributes:
        alone: on one head of a layer.
        all: on all heads of the layer.
    """

    alone: float
    all: float


@dataclass(frozen=True)
class LayerLatency:
    """Seconds of patterns in a layer.

    Args:
        seconds: by the written form of the pattern; ``Dense()`` is among them.
        heads: number of heads of the layer.
        heads_run_separately: whether heads of different patterns run one after the other (plain
            torch) and not in one launch.
    """

    seconds: Mapping[str, HeadLatency]
    heads: int
    heads_run_separately: bool

    def head(self, pattern: HeadPattern) -> float:
        """Return the seconds of one head, as a summand where the patterns of the other heads are
        not known."""
        latency = self.seconds[repr(pattern)]
        return latency.alone if self.heads_run_separately else latency.all / self.heads

    def layer(self, patterns: Sequence[HeadPattern]) -> float:
        """Return the seconds of a layer with these patterns of its heads."""
        counts = Counter(map(repr, patterns))
        if not self.heads_run_separately:
            return sum(n * self.seconds[name].all / self.heads for name, n in counts.items())
        return sum(self._interpolated(self.seconds[name], n) for name, n in counts.items())

    @property
    def dense(self) -> float:
        """Seconds of a layer without a plan."""
        return self.seconds[DENSE].all

    def _interpolated(self, latency: HeadLatency, heads: int) -> float:
        """Return the seconds of several heads of one pattern, linear between one and all heads."""
        if heads == self.heads or self.heads == 1:
            return latency.all
        return latency.alone + (heads - 1) / (self.heads - 1) * (latency.all - latency.alone)


@torch.no_grad()
def measure(
    patterns: Sequence[HeadPattern],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    dense_attention: DenseAttention = TORCH,
) -> tuple[dict[str, HeadLatency], dict[str, str]]:
    """Time patterns and dense attention on a call, in interleaved repetitions.

    Args:
        patterns: the patterns to time. ``Dense()`` is always timed.
        q: queries ``[1, H, L, D]`` of the pipeline.
        k: keys ``[1, Hk, L, D]``.
        v: values ``[1, Hk, L, D]``.
        layout: the layout of the tokens.
        dense_attention: what the pipeline runs for dense heads.

    Returns:
        The seconds by written form, and the errors of the patterns that could not run.
    """
    group = q.shape[1] // k.shape[1]
    index, shared = (torch.tensor([0], device=q.device) for _ in range(2))
    all_only = q.shape[1] == 1 or group > 1  # one head is not timed alone

    def of_all(pattern: HeadPattern) -> Callable[[], object]:
        if pattern == Dense():
            return lambda: dense_attention.run(q, k, v)
        return lambda: sparse_attention(q, k, v, pattern, layout)

    def of_one(pattern: HeadPattern) -> Callable[[], object]:
        def run() -> None:
            inputs = q[:, index], k[:, shared], v[:, shared]
            if pattern == Dense():
                out = dense_attention.run(*inputs)
            else:
                out = sparse_attention(*inputs, pattern, layout)
            torch.empty_like(q[:, :1])[:] = out

        return run

    functions: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for pattern in (Dense(), *dict.fromkeys(patterns)):
        name = repr(pattern)
        timed = {f"all {name}": of_all(pattern)}
        if not all_only:
            timed[f"alone {name}"] = of_one(pattern)
        try:
            for function in timed.values():
                function()
        except Exception as error:  # Triton raises errors of its own types
            failures[name] = " ".join(str(error).split())[:300]
        else:
            functions |= timed
    times = interleaved(functions, q.device, SPAN * len(functions))
    names = [name.removeprefix("all ") for name in functions if name.startswith("all ")]
    return {
        name: HeadLatency(
            times["all " + name if all_only else "alone " + name].seconds,
            times["all " + name].seconds,
        )
        for name in names
    }, failures


def heads_run_separately(q: torch.Tensor) -> bool:
    """Whether heads of different patterns run one after the other."""
    return choose_backend("auto", q).backend == "blockwise"
