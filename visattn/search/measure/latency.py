"""What a pattern costs in a layer, measured on one of its calls."""

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

SPAN = 0.06  # seconds that the calls of a pattern may take
DENSE = repr(Dense())


class HeadLatency(NamedTuple):
    """Of a pattern on one head of a layer, and on all of its heads."""

    alone: float
    all: float


@dataclass(frozen=True)
class LayerLatency:
    """What patterns cost in a layer of ``heads`` heads.

    Args:
        seconds: by written form, ``Dense()`` among them.
        heads: of the layer; parted: whether heads of different patterns run one after the other
            (plain torch) and not in one launch.
    """

    seconds: Mapping[str, HeadLatency]
    heads: int
    heads_run_separately: bool

    def head(self, pattern: HeadPattern) -> float:
        """What a head costs, for adding up before its neighbours are known."""
        own = self.seconds[repr(pattern)]
        return own.alone if self.heads_run_separately else own.all / self.heads

    def layer(self, patterns: Sequence[HeadPattern]) -> float:
        """What a layer costs."""
        counts = Counter(map(repr, patterns))
        if not self.heads_run_separately:
            return sum(n * self.seconds[name].all / self.heads for name, n in counts.items())
        return sum(self._some(self.seconds[name], n) for name, n in counts.items())

    @property
    def dense(self) -> float:
        """A layer without a plan."""
        return self.seconds[DENSE].all

    def _some(self, own: HeadLatency, heads: int) -> float:
        """Of heads that share a pattern: on a line between one and all."""
        if heads == self.heads or self.heads == 1:
            return own.all
        return own.alone + (heads - 1) / (self.heads - 1) * (own.all - own.alone)


@torch.no_grad()
def measure(
    patterns: Sequence[HeadPattern],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    dense_attention: DenseAttention = TORCH,
) -> tuple[dict[str, HeadLatency], dict[str, str]]:
    """Time patterns, and dense attention, on a call; all of them take turns.

    Args:
        patterns: to time, besides ``Dense()``.
        q: ``[1, H, L, D]``, as a pipeline has it.
        k, v: ``[1, Hk, L, D]``.
        layout: of the tokens.
        dense_attention: what the pipeline runs where a head is dense.

    Returns:
        Seconds by written form; and why some could not run.
    """
    group = q.shape[1] // k.shape[1]
    index, shared = (torch.tensor([0], device=q.device) for _ in range(2))
    one = q.shape[1] == 1 or group > 1

    def of_all(pattern: HeadPattern) -> Callable[[], object]:
        if pattern == Dense():
            return lambda: dense_attention.run(q, k, v)
        return lambda: sparse_attention(q, k, v, pattern, layout)

    def of_one(pattern: HeadPattern) -> Callable[[], object]:
        def run() -> None:
            own = q[:, index], k[:, shared], v[:, shared]
            if pattern == Dense():
                out = dense_attention.run(*own)
            else:
                out = sparse_attention(*own, pattern, layout)
            torch.empty_like(q[:, :1])[:] = out

        return run

    functions: dict[str, Callable[[], object]] = {}
    failures: dict[str, str] = {}
    for pattern in (Dense(), *dict.fromkeys(patterns)):
        name = repr(pattern)
        own = {f"all {name}": of_all(pattern)}
        if not one:
            own[f"alone {name}"] = of_one(pattern)
        try:
            for function in own.values():
                function()
        except Exception as error:  # Triton has errors of types of its own
            failures[name] = " ".join(str(error).split())[:300]
        else:
            functions |= own
    times = interleaved(functions, q.device, SPAN * len(functions))
    names = [name.removeprefix("all ") for name in functions if name.startswith("all ")]
    return {
        name: HeadLatency(
            times["all " + name if one else "alone " + name].seconds, times["all " + name].seconds
        )
        for name in names
    }, failures


def heads_run_separately(q: torch.Tensor) -> bool:
    """Whether heads of different patterns run one after the other."""
    return choose_backend("auto", q).backend == "blockwise"
