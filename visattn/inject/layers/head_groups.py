"""What the heads of a layer run in a part of the batch."""

from __future__ import annotations

import functools

import torch

from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.patterns import Dense, HeadPattern, Pattern
from visattn.runtime.torch_settings import lasting
from visattn.selectors import Agent

__all__ = ["DENSE", "HeadGroups", "Heads", "is_dense"]

Heads = tuple[HeadPattern, ...]
DENSE = Dense()


class HeadGroups:
    """What the heads of a layer run in a part of the batch: the numbers of the dense heads, and the
    numbers and patterns of the others."""

    def __init__(self, heads: Heads, layout: TokenLayout) -> None:
        self.heads = heads
        self.dense = [n for n, pattern in enumerate(heads) if is_dense(pattern, layout)]
        self.sparse = [n for n in range(len(heads)) if n not in set(self.dense)]
        self.patterns = tuple(heads[n] for n in self.sparse)
        self.dynamic = any(not isinstance(pattern, Pattern) for pattern in self.patterns)
        agents = {isinstance(pattern, Agent) for pattern in self.patterns}
        self.kernels, self.products = False in agents, True in agents
        self._indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @lasting
    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the dense and the other heads as indices on a device, copied to it once."""
        if device not in self._indices:
            dense, sparse = (torch.tensor(x, device=device) for x in (self.dense, self.sparse))
            if torch.compiler.is_compiling():
                return dense, sparse
            self._indices[device] = dense, sparse
        return self._indices[device]


@functools.lru_cache(maxsize=4096)
@on_cpu
def is_dense(pattern: HeadPattern, layout: TokenLayout) -> bool:
    """Return whether a pattern keeps every pair of a layout. A few rows are enough for most
    patterns, so the pairs are seldom counted."""
    if pattern == DENSE:
        return True
    if not isinstance(pattern, Pattern):
        return False  # this is known only at a call
    queries = torch.linspace(0, layout.length - 1, 5).long()[:, None]
    if not bool(pattern.allows(queries, torch.arange(layout.length), layout).all()):
        return False
    return pattern.density(layout) == 1.0
