"""Selectors that order the tokens separately for each batch item and head."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import NamedTuple

import torch

from visattn.geometry.layout import TokenLayout, on_cpu
from visattn.geometry.orders import Order
from visattn.selectors.selector import Selector, only_grid
from visattn.selectors.stages.blocks import BlockPartition, partition_by_head
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.selection import Selection

__all__ = [
    "PerHeadSelector",
    "Runs",
    "even_runs",
    "grid_rows",
    "grid_tokens",
    "order_runs",
    "uneven_runs",
]


class Runs(NamedTuple):
    """Runs of consecutive tokens of an order, one for each block; int64 ``[B, H, M]`` each.

    Attributes:
        start: first place of the run in the order.
        length: tokens of the run.
        group: number of the group (for example the cluster) that the run is a part of.
    """

    start: torch.Tensor
    length: torch.Tensor
    group: torch.Tensor


def even_runs(like: torch.Tensor, size: int) -> Runs:
    """Cut an order ``[B, H, n]`` into runs of ``size`` tokens; the last one may be shorter."""
    count = like.shape[2]
    start = torch.arange(0, count, size, device=like.device)
    length = (count - start).clamp(max=size)
    number = torch.arange(len(start), device=like.device)
    shape = (*like.shape[:2], -1)
    return Runs(start.expand(shape), length.expand(shape), number.expand(shape))


def order_runs(layout: TokenLayout, order: Order, size: int, like: torch.Tensor) -> Runs:
    """Return the blocks of the one grid in an order, for all heads of ``like``, ``[B, H, ...]``."""
    runs = _shared_runs(layout, (order,), size, like.device)
    return Runs(*(x.expand(*like.shape[:2], -1) for x in runs))


@functools.lru_cache(maxsize=64)
@on_cpu
def _shared_runs(
    layout: TokenLayout, order: tuple[Order], size: int, device: torch.device
) -> Runs:
    """Return the runs of ``order_runs`` for a single head."""
    blocks = order[0].blocks(layout.grids[0][1], size)
    number = torch.arange(len(blocks.start))
    return Runs(*(x.to(device) for x in (blocks.start, blocks.length, number)))


def uneven_runs(counts: torch.Tensor, tokens: int, size: int) -> Runs:
    """Cut consecutive groups of an order into runs of at most ``size`` tokens.

    Args:
        counts: tokens of each group, int64 ``[B, H, C]``.
        tokens: the sum of the counts.
        size: most tokens of a run.

    Returns:
        ``C + tokens // size`` runs, enough for any counts; unused runs are empty. The number of
        runs does not depend on values on the device, so the host need not wait for it.
    """
    groups = counts.shape[2]
    pieces = -(-counts // size)
    ends = pieces.cumsum(2)
    number = torch.arange(groups + tokens // size, device=counts.device)
    number = number.expand(*counts.shape[:2], -1).contiguous()
    group = torch.searchsorted(ends, number, right=True)
    used = group < groups
    group = group.clamp(max=groups - 1)
    piece = number - (ends - pieces).gather(2, group)
    first = (counts.cumsum(2) - counts).gather(2, group)
    length = (counts.gather(2, group) - piece * size).clamp(0, size) * used
    start = torch.where(used, first + piece * size, 0)
    return Runs(start, length, group)


class PerHeadSelector(Selector):
    """Base class: ``arrange`` gives the orders and blocks, ``choose`` the kept pairs of blocks."""

    @abstractmethod
    def arrange(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        past: SelectorState,
    ) -> tuple[torch.Tensor, Runs, int, torch.Tensor, Runs, int]:
        """Return the order, runs and largest run length of the queries, then those of the keys.

        Orders are int64 ``[B, H, n]``: grid tokens, counted from the first grid token. The method
        may read and change ``past``.
        """

    @abstractmethod
    def choose(
        self, inputs: Inputs, q_runs: Runs, k_runs: Runs
    ) -> torch.Tensor:
        """Return the kept pairs of grid blocks, bool ``[B, H, Mq, Mk]``."""

    def finished(self, selection: Selection) -> Selection:
        """Return the selection with additions besides the levels, such as its rest."""
        return selection

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: SelectorState | None = None,
    ) -> Selection:
        only_grid(layout, self)
        q_order, q_runs, q_size, k_order, k_runs, k_size = self.arrange(
            q, k, layout, scale, SelectorState() if past is None else past
        )
        q_side = partition_by_head(layout, q_order, q_runs.start, q_runs.length, q_size)
        k_side = partition_by_head(layout, k_order, k_runs.start, k_runs.length, k_size)
        inputs = Inputs(q, k, v, layout, scale, q_side, k_side, kernels)
        kept = self.choose(inputs, q_runs, k_runs)
        rows = grid_rows(layout, q_side, q_runs), grid_rows(layout, k_side, k_runs)
        selection = self.finished(Selection.of(q_side, k_side, _levels(kept, q_side, k_side, rows)))
        means = (inputs.q_mean[:, :, rows[0]], inputs.k_mean[:, :, rows[1]])
        size = means[0].sum((2, 3), keepdim=True) + means[1].sum((2, 3), keepdim=True)
        return selection.guarded(size.abs())


def grid_rows(layout: TokenLayout, side: BlockPartition, runs: Runs) -> slice:
    """Return which blocks of a side are those of the one grid.

    The result equals ``side.grid``, without a wait for the device.
    """
    before = layout.segments[: [s.kind for s in layout.segments].index("grid")]
    first = sum(-(-segment.length // side.size) for segment in before)
    return slice(first, first + runs.start.shape[2])


def _levels(
    kept: torch.Tensor, q_side: BlockPartition, k_side: BlockPartition, rows: tuple[slice, slice]
) -> torch.Tensor:
    """Return the levels of all blocks; blocks outside the grid see all and are seen by all."""
    levels = torch.ones(
        *kept.shape[:2], len(q_side), len(k_side), dtype=torch.uint8, device=kept.device
    )
    levels[:, :, rows[0], rows[1]] = kept.to(torch.uint8)
    there = (q_side.length > 0)[..., :, None] & (k_side.length > 0)[..., None, :]
    return levels * there


def grid_tokens(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return ``[B, H, L, D]`` at the tokens of the one grid, ``[B, H, n, D]``."""
    begin, grid = layout.grids[0]
    return x[:, :, begin : begin + grid.numel]
