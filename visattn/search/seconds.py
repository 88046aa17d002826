"""What a pattern costs in a layer, measured on one of its calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention import choose_backend, sparse_attention
from visattn.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern

__all__ = ["HeadTimes", "Seconds", "measure", "parted"]

LEAST, MOST = 3, 15  # runs of a pattern
SPAN = 0.06  # seconds that its runs may take, beyond the least
DENSE = repr(Dense())


class Seconds(NamedTuple):
    """Of a pattern on one head of a layer, and on all of its heads."""

    alone: float
    all: float


@dataclass(frozen=True)
class HeadTimes:
    """What patterns cost in a layer of ``heads`` heads.

    Args:
        seconds: by written form, ``Dense()`` among them.
        heads: of the layer; parted: whether heads of different patterns run one after the other
            (plain torch) and not in one launch.
    """

    seconds: Mapping[str, Seconds]
    heads: int
    parted: bool

    def head(self, pattern: HeadPattern) -> float:
        """What a head costs, for adding up before its neighbours are known."""
        own = self.seconds[repr(pattern)]
        return own.alone if self.parted else own.all / self.heads

    def layer(self, patterns: Sequence[HeadPattern]) -> float:
        """What a layer costs."""
        counts = Counter(map(repr, patterns))
        if not self.parted:
            return sum(n * self.seconds[name].all / self.heads for name, n in counts.items())
        return sum(self._some(self.seconds[name], n) for name, n in counts.items())

    @property
    def dense(self) -> float:
        """A layer without a plan."""
        return self.seconds[DENSE].all

    def _some(self, own: Seconds, heads: int) -> float:
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
    scale: float | None,
) -> tuple[dict[str, Seconds], dict[str, str]]:
    """Time patterns, and dense attention, on a call; the least of several runs, as what else the
    machine does can only add to it.

    Args:
        q: ``[1, H, L, D]``, as a pipeline has it; k, v: ``[1, Hk, L, D]``.

    Returns:
        Seconds by written form; and why some could not run.
    """
    group = q.shape[1] // k.shape[1]
    index, shared = (torch.tensor([0], device=q.device) for _ in range(2))
    one = q.shape[1] == 1 or group > 1

    def of_all(pattern: HeadPattern) -> Callable[[], object]:
        if pattern == Dense():
            return lambda: scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=group > 1)
        return lambda: sparse_attention(q, k, v, pattern, layout, scale=scale)

    def of_one(pattern: HeadPattern) -> Callable[[], object]:
        def run() -> None:
            own = q[:, index], k[:, shared], v[:, shared]
            if pattern == Dense():
                out = scaled_dot_product_attention(*own, scale=scale)
            else:
                out = sparse_attention(*own, pattern, layout, scale=scale)
            torch.empty_like(q[:, :1])[:] = out

        return run

    found: dict[str, Seconds] = {}
    failures: dict[str, str] = {}
    for pattern in (Dense(), *dict.fromkeys(patterns)):
        try:
            every = _least(of_all(pattern), q.device)
            alone = every if one else _least(of_one(pattern), q.device)
            found[repr(pattern)] = Seconds(alone, every)
        except (RuntimeError, ValueError, MemoryError) as error:
            failures[repr(pattern)] = " ".join(str(error).split())[:300]
    return found, failures


def parted(q: torch.Tensor) -> bool:
    """Whether heads of different patterns run one after the other."""
    return choose_backend("auto", q).backend == "blockwise"


def _least(run: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    found: list[float] = []
    end = time.perf_counter() + SPAN
    while len(found) < LEAST or (len(found) < MOST and time.perf_counter() < end):
        begin = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - begin)
    return min(found)
