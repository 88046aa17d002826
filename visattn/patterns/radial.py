"""Radial attention: a band inside each pair of frames, narrower for frames further apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch

from visattn._arguments import check_count, check_flag, is_number
from visattn.blocks.predicates import (
    Axis,
    AxisRule,
    Places,
    Predicate,
    RadialBand,
    linear_form,
)
from visattn.blocks.table_predicates import CoarseTable
from visattn.geometry.layout import Grid
from visattn.geometry.orders import LineOrder, Order
from visattn.patterns.base.pattern import Pattern, SearchMembers
from visattn.patterns.base.sizes import count_runs
from visattn.patterns.diagonal import band_pairs

RadialRule = Literal["block", "token", "paper"]
SHORTEST = 128  # a diagonal shorter than this is thinned over frames instead, in the published form
CHUNK = 1 << 18  # elements of a temporary


@dataclass(frozen=True, eq=False)
class Radial(Pattern):
    """Frames ``d`` apart keep ``|r_q - r_k| <= w(d)``, ``r`` the raster index inside the frame.

    With ``n`` tokens a frame and ``l(d) = 2^(floor(log2 n) - floor(log2 d))``: ``w(0) = w(1) =
    n``, and ``w(d) = max(block, decay * l(d))``; where ``l(d) < 128`` only every ``floor(128 /
    l(d))``-th distance is kept. In a frame of fewer tokens the largest power of two within it
    replaces 128 and ``block``, and the block rule is the token rule where the frame
    is less than a block.

    Args:
        decay: factor of the width beyond neighbouring frames, above 0. Published: 0.95 and 1 for
            HunyuanVideo, 0.2 and 1 (with ``sink``) for Wan 2.1, 0.8 for Wan 2.2.
        sink: every query sees all of frame 0.
        rule: ``"block"`` decides whole blocks of raster tokens: in the part of a block pair that
            lies in one pair of frames, more than 60 % of the key columns that the token rule
            touches must be kept for more than a third of the block's rows; a block always sees
            itself. ``"token"`` is the token rule. ``"paper"`` keeps ``|r_q - r_k| < n / r`` with
            ``r`` the power of two at or below ``d``.
        block: tokens of a block in the block rule, at least 32, and the least width.

    Raises:
        TypeError, ValueError: a parameter has a wrong type or value.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.patterns import Radial
        >>> pattern = Radial(decay=0.2, sink=True)
        >>> round(pattern.density(TokenLayout(Grid(6, 8, 8))), 3)
        0.833

    Source:
        Li et al. (2025), "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long
        Video Generation", arXiv 2506.19852. Code: github.com/mit-han-lab/radial-attention (commit
        72788d4).
    Default:
        code. ``rule="paper"`` is equation 4 as written, about 1.5 times denser.
    Differences:
        - The code has the sink for Wan and not for HunyuanVideo; here it is a parameter.
        - Frames of fewer than 128 tokens, which the code does not provide for.
    """

    decay: float = 1.0
    sink: bool = False
    rule: RadialRule = "block"
    block: int = 128
    name: ClassVar[str] = "radial"
    family: ClassVar[str] = "bands"
    color: ClassVar[str] = "#f3bd4b"
    example: ClassVar[str] = "radial(rule='paper')"

    def __post_init__(self) -> None:
        if not is_number(self.decay):
            raise TypeError(f"decay={self.decay!r} must be a number above 0")
        if not (math.isfinite(self.decay) and self.decay > 0):
            raise ValueError(f"decay={self.decay} must be finite and above 0")
        check_flag("sink", self.sink)
        if self.rule not in get_args(RadialRule):
            raise ValueError(f"rule={self.rule!r} must be 'block', 'token' or 'paper'")
        check_count("block", self.block, 32)

    @classmethod
    def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
        run = 32 if grid.height * grid.width < 512 else 128
        return {
            "radial": lambda share: Radial(decay=max(4 * share, 0.01), block=run),
            "radial with sink": lambda share: Radial(
                decay=max(4 * share, 0.01), sink=True, block=run
            ),
        }

    def by_block(self, grid: Grid) -> bool:
        """Whether whole blocks are decided on this grid."""
        return self.rule == "block" and _plane(grid) >= self.block

    def width(self, distance: int, grid: Grid) -> int:
        """Half-width at a frame distance; -1 where nothing is kept."""
        plane = _plane(grid)
        if self.rule == "paper":
            step = 1 << (max(distance, 1).bit_length() - 1)
            if step <= plane:
                return plane // step - 1
            return 0 if distance % -(-step // plane) == 0 else -1
        largest = 1 << (plane.bit_length() - 1)
        length = largest / (1 << (distance.bit_length() - 1)) if distance else 2.0 * largest
        shortest = min(SHORTEST, largest)
        if length < shortest and distance % int(shortest / length):
            return -1
        if distance <= 1:
            return plane
        return math.floor(min(plane, max(min(self.block, largest), self.decay * length)))

    def widths(self, grid: Grid) -> torch.Tensor:
        """Half-width at every frame distance, int64 ``[frames]``."""
        return torch.tensor([self.width(distance, grid) for distance in range(grid.frames)])

    def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
        q_form, k_form = linear_form(grid.strides, q), linear_form(grid.strides, k)
        if self.by_block(grid):
            table = _block_table(self, grid).to(q[0].device)
            return table[q_form // self.block, k_form // self.block]
        width = self.widths(grid).to(q[0].device)[(q[0] - k[0]).abs()]
        kept = (q_form % _plane(grid) - k_form % _plane(grid)).abs() <= width
        return kept | (k[0] == 0) if self.sink else kept

    def pairs(self, grid: Grid) -> int:
        plane = _plane(grid)
        if self.by_block(grid):
            table = _block_table(self, grid)
            length = torch.full((len(table),), self.block)
            length[-1] = grid.numel - self.block * (len(table) - 1)
            return int((table * (length[:, None] * length)).sum())
        total = 0
        for distance, width in enumerate(self.widths(grid).tolist()):
            band = band_pairs(plane, width) if width >= 0 else 0
            total += (grid.frames - distance) * (2 if distance else 1) * band
            if self.sink and distance:
                total += plane * plane - band
        return total

    def predicates(self, grid: Grid) -> tuple[Predicate, ...]:
        if self.by_block(grid):
            return (CoarseTable(grid.strides, self.block, _block_table(self, grid)),)
        band = RadialBand(grid, self.widths(grid))
        if not self.sink:
            return (band,)
        first = AxisRule(
            torch.zeros(grid.frames, dtype=torch.int64), torch.zeros(grid.frames, dtype=torch.int64)
        )
        return (
            band,
            Axis((first, AxisRule.everything(grid.height), AxisRule.everything(grid.width))),
        )

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        return LineOrder(), LineOrder()


def _plane(grid: Grid) -> int:
    return grid.height * grid.width


@lru_cache(maxsize=16)
def _block_table(pattern: Radial, grid: Grid) -> torch.Tensor:
    """Kept pairs of raster blocks, bool ``[n, n]``.

    Blocks are split where a frame ends. Inside one pair of frames the rows kept for a key column
    are an interval, so that the columns kept for at least ``m`` rows are one too, and counts are
    closed. As in the published form a frame is drawn on ``ceil(n / block)`` blocks from its first
    one on, so that what an unaligned frame has in one more block counts for nothing there; here,
    unlike there, the diagonal stays whatever the counts.
    """
    unit, plane = pattern.block, _plane(grid)
    blocks = count_runs("block", unit, grid)
    begins = torch.cat(
        [torch.arange(0, grid.numel, unit), torch.arange(0, grid.numel, plane)]
    ).unique()
    ends = torch.cat([begins[1:], torch.tensor([grid.numel])])
    owner, frame = begins // unit, begins // plane
    first, last = begins - frame * plane, ends - 1 - frame * plane  # inside the frame
    rows = (grid.numel - owner * unit).clamp(max=unit)  # of the block
    drawn = owner - frame * plane // unit < -(-plane // unit)
    widths = pattern.widths(grid).int()
    frame, first, last, rows = (x.int() for x in (frame, first, last, rows))
    table = torch.zeros(blocks, blocks, dtype=torch.uint8)
    step = max(1, CHUNK // len(begins))
    for begin in range(0, len(begins), step):
        part = slice(begin, begin + step)
        r0, r1, need = first[part, None], last[part, None], rows[part, None] // 3 + 1
        width = widths[(frame[part, None] - frame).abs()]
        if pattern.sink:
            width = torch.where(frame == 0, plane, width)

        def columns(least: torch.Tensor | int) -> torch.Tensor:
            """Columns of each piece that are kept for at least ``least`` rows."""
            low = torch.maximum(first, r0 - width - 1 + least)  # noqa: B023
            high = torch.minimum(last, r1 + width + 1 - least)  # noqa: B023
            reached = (r1 - r0 + 1 >= least) & (2 * width + 1 >= least)  # noqa: B023
            count: torch.Tensor = (high - low + 1).clamp(min=0) * reached
            return count

        kept = (
            (5 * columns(need) > 3 * columns(1)) & (width >= 0) & drawn[part, None] & drawn
        ).byte()
        by_key = torch.zeros(len(kept), blocks, dtype=torch.uint8)
        by_key.scatter_reduce_(1, owner.expand(kept.shape), kept, "amax")
        table.scatter_reduce_(0, owner[part, None].expand(by_key.shape), by_key, "amax")
    kept_blocks: torch.Tensor = table.bool() | torch.eye(blocks, dtype=torch.bool)
    return kept_blocks
