"""Video mixture of block attention: queries choose key blocks by gates.

The blocks are runs of frames, windows over all frames, or boxes; they change from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn._arguments import (
    check_block,
    check_count,
    check_flag,
    check_keep,
    check_share,
    check_word,
)
from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import BoxOrder, LineOrder, Order
from visattn.patterns.base.head_pattern import HeadPattern
from visattn.selectors.selector import (
    SEARCHED_SHARES,
    BlockSelector,
    Stages,
    only_grid,
)
from visattn.selectors.stages.choose import ChoiceRule, TopK, as_scope, of_scope
from visattn.selectors.stages.prefix import of_total, order_keys, smallest_prefix, top_count
from visattn.selectors.stages.scores import Pooled

__all__ = ["PARTITIONS", "SCOPES", "GateMass", "VMoBA"]

PARTITIONS = ("1d", "2d", "3d")
SCOPES = ("query", "block", "head", "overall")
UNITS = 1 << 20  # the integer that represents a gate of 1
EPS = 1e-6


@dataclass(frozen=True)
class GateMass(ChoiceRule):
    """The smallest set whose gates hold a share of their sum.

    Args:
        share: share of the sum of gates, each shifted and scaled to [0, 1] over the scope.
        scope: ``"query"`` (a row), ``"block"`` (all heads and queries of a key block), ``"head"``
            or ``"overall"`` (all heads of a batch item).
        more: keep at least one pair of each scope beyond the forced ones.

    Forced blocks are kept, and their gates count first.
    """

    share: float = 0.25
    scope: str = "query"
    more: bool = True

    def __call__(
        self, scores: torch.Tensor, length: torch.Tensor, forced: torch.Tensor
    ) -> torch.Tensor:
        rows = _scoped(scores, self.scope)
        forced_rows = _scoped(forced.expand_as(scores), self.scope)
        free = rows > -torch.inf
        high = rows.amax(-1, keepdim=True)
        low = rows.masked_fill(~free, torch.inf).amin(-1, keepdim=True)
        gates = ((rows - low) / (high - low + EPS)).masked_fill(~free, 0)
        weights = (gates * UNITS).long()
        total = weights.sum(-1, keepdim=True)
        target = of_total(self.share, total)
        missing = target - (weights * (forced_rows & free)).sum(-1, keepdim=True)
        others = rows.masked_fill(forced_rows, -torch.inf)
        kept = smallest_prefix(order_keys(others), weights, missing)
        if self.more:
            kept = kept | top_count(others, 1)
        return (_unscoped(kept, scores, self.scope) | forced).to(torch.uint8)


def _scoped(x: torch.Tensor, scope: str) -> torch.Tensor:
    """Return ``[B, H, Nq, Nk]`` with the competing pairs on the last axis."""
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2)[:, None]
    if scope == "overall":
        return x.flatten(1)[:, None, None]
    return as_scope(x, "row" if scope == "query" else "head")


def _unscoped(x: torch.Tensor, like: torch.Tensor, scope: str) -> torch.Tensor:
    """Return the result of ``_scoped`` in the shape of ``like`` again."""
    if scope == "block":
        batch, heads, num_q, num_k = like.shape
        return x.view(batch, num_k, heads, num_q).permute(0, 2, 3, 1)
    return of_scope(x, like)


@dataclass(frozen=True, eq=False)
class VMoBA(BlockSelector):
    """The key blocks with the highest gates, in the partition of the layer, and the own block.

    The gate is the product of a query with the mean key of a block, without scale. Gates are
    shifted and scaled to [0, 1] over a scope. The smallest set of blocks whose gates hold a share
    of their sum is kept; the own block counts first. The share is not one of attention mass,
    because gates are similarities.

    Args:
        partition: ``"1d"``, ``"2d"`` or ``"3d"``; ``for_layers`` gives the published cycle.
        frames: frames of a 1-D block.
        window: rows and columns of a 2-D block.
        box: sides of a 3-D block, (frames, height, width) in tokens.
        share: share of the sum of gates, or None to use ``keep``.
        keep: number of blocks of a row, including its own, or the share of them.
        scope: what competes: ``"query"`` (the blocks of a row), ``"block"`` (all heads and queries
            of a key block), ``"head"`` (all pairs of a head) or ``"overall"`` (all heads of a batch
            item). With ``keep``, only ``"query"`` or ``"head"``.
        queries: queries that choose together by their mean; 1 is the published gate.
        more: with ``share``, each scope keeps at least one block besides the own ones, as in the
            code. False is the paper's rule: the smallest set with the share.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import VMoBA
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, VMoBA("3d", box=(2, 4, 4), queries=16), layout).shape
        torch.Size([1, 2, 128, 16])

    Source:
        Wu et al. (2025), "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv
        2506.23858. Code: github.com/KwaiVGI/VMoBA (commit 4da72ff).
    Default:
        code
    Differences:
        - 64 queries choose together; ``queries=1`` is the code's gate of single queries.
        - The partition is 3-D in boxes of (4, 4, 4) unless ``for_layers`` makes the cycle of
          partitions.
        - Blocks at the borders may be smaller, where the code needs exact division.
        - A row with nothing but its own block sees that block; the code computes all blocks where
          no row has another one.
        - Text is kept and not scored.
        - Heads that do not run this pattern do not compete in the scopes ``"block"`` and
          ``"overall"``.
    """

    partition: str = "3d"
    frames: int = 2
    window: tuple[int, int] = (4, 4)
    box: tuple[int, int, int] = (4, 4, 4)
    share: float | None = 0.25
    keep: int | float = 0.2
    scope: str = "query"
    queries: int = 64
    more: bool = True
    name: ClassVar[str] = "vmoba"
    color: ClassVar[str] = "#f0c9de"
    example: ClassVar[str] = "vmoba('3d', box=(2, 2, 2), queries=4)"
    row_independent: ClassVar[bool] = True
    before: ClassVar[dict[str, object]] = {"more": False}

    def __post_init__(self) -> None:
        check_word("partition", self.partition, PARTITIONS)
        check_count("frames", self.frames, 1)
        for name, sides in (("window", 2), ("box", 3)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != sides:
                raise TypeError(f"{name}={value!r} must be {sides} integers")
            for side in value:
                check_count(name, side, 1)
        if self.share is not None:
            check_share("share", self.share)
        check_keep("keep", self.keep)
        check_word("scope", self.scope, SCOPES)
        if self.share is None and self.scope not in ("query", "head"):
            raise ValueError(
                f"scope={self.scope!r} goes with share; with keep it is 'query' or 'head'"
            )
        check_block("queries", self.queries)
        check_flag("more", self.more)

    @classmethod
    def for_layers(cls, layers: int, dense: int = 0, **options: object) -> tuple[VMoBA | None, ...]:
        """Return the cycle 1-D, 2-D, 3-D over the layers; the first ``dense`` layers are None."""
        check_count("layers", layers, 1)
        check_count("dense", dense, 0)
        return tuple(
            None
            if layer < dense
            else cls(partition=PARTITIONS[(layer - dense) % 3], **options)  # type: ignore[arg-type]
            for layer in range(layers)
        )

    def key_order(self, grid: Grid) -> tuple[Order, int]:
        """Return the order of a grid's keys and the most tokens of a block."""
        plane = grid.height * grid.width
        if self.partition == "1d":
            return LineOrder(), min(self.frames, grid.frames) * plane
        if self.partition == "2d":
            sides = (grid.frames, *self.window)
        else:
            sides = self.box
        t, h, w = (min(a, b) for a, b in zip(sides, grid.shape, strict=True))
        return BoxOrder((t, h, w)), t * h * w

    @classmethod
    def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
        return {
            "mixture of blocks": [
                cls("3d", 1, (4, 4), (1, 4, 4), share, 0.01, "head", block)
                for share in SEARCHED_SHARES[:2]
            ]
        }

    def stages(self, layout: TokenLayout) -> Stages:
        order, size = self.key_order(only_grid(layout, self))
        choose: ChoiceRule
        if self.share is not None:
            choose = GateMass(self.share, self.scope, self.more)
        else:
            choose = TopK(self.keep, scope="row" if self.scope == "query" else "head")
        return Stages(
            score=Pooled(scaled=False, log_size=False),
            choose=choose,
            orders=("raster" if self.queries == 1 else "tiles", order),
            blocks=(self.queries, size),
        )
