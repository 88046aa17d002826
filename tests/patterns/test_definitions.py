"""The remaining patterns, pair by pair from their definitions in plain Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from visattn import Grid, Segment, TokenLayout
from visattn.patterns import (
    AxisOrder,
    Dense,
    Diagonal,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Sharded,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Union,
)

GRID = Grid(4, 5, 6)
Place = tuple[int, int, int]


def raster(p: Place) -> int:
    return (p[0] * 5 + p[1]) * 6 + p[2]


def temporal(p: Place) -> int:
    return (p[1] * 6 + p[2]) * 4 + p[0]


def near_tile(q: Place, k: Place) -> bool:
    """Tiles 2x2x2 in windows of 1, 3 and 2 (acts as 3) tiles of the grid of 2x3x3 tiles."""
    for axis, (count, window) in enumerate(((2, 1), (3, 3), (3, 2))):
        center = min(max(q[axis] // 2, window // 2), count - 1 - window // 2)
        if abs(k[axis] // 2 - center) > window // 2:
            return False
    return True


def sharded(q: Place, k: Place) -> bool:
    a, b = raster(q) // 32, raster(k) // 32
    return abs(a - b) < 1 or (b + 1 + 1) % 3 == 0


def stencil(q: Place, k: Place) -> bool:
    tile = (2, 2, 3)
    shift = tuple(b // s - a // s for a, b, s in zip(q, k, tile, strict=True))
    column = (k[0] // 2 * 3 + k[1] // 2) * 2 + k[2] // 3
    return shift in {(0, 0, 0), (1, 0, 0), (0, -1, 1)} or column == 5


DEFINITIONS: dict[Pattern, Callable[[Place, Place], bool]] = {
    Dense(): lambda q, k: True,
    Skip(): lambda q, k: False,
    Diagonal(7): lambda q, k: abs(raster(q) - raster(k)) <= 7,
    Diagonal(0.1): lambda q, k: abs(raster(q) - raster(k)) <= 12,
    MultiDiagonal(5): lambda q, k: abs(temporal(q) - temporal(k)) <= 5,
    Stripe(): lambda q, k: k[0] == 0,
    Stripe(False, (3, 0.5, (100, 104))): lambda q, k: raster(k) in {3, 60, 100, 101, 102, 103},
    SlidingTile(2, (1, 3, 2)): near_tile,
    Sharded(1, 3, 1, 32): sharded,
    Sharded(1, 3, 1, 32, causal=True): lambda q, k: sharded(q, k) and raster(k) <= raster(q),
    Stencil((2, 2, 3), ((0, 0, 0), (1, 0, 0), (0, -1, 1)), (5,)): stencil,
    AxisOrder(Diagonal(5), "hwt"): lambda q, k: abs(temporal(q) - temporal(k)) <= 5,
    AxisOrder(Stripe(), "wht"): lambda q, k: k[2] == 0,
    AxisOrder(Neighborhood((1, 3, 1)), "twh"): lambda q, k: (
        q[0] == k[0] and q[1] == k[1] and abs(min(max(q[2], 1), 4) - k[2]) <= 1
    ),
    Union(Diagonal(2), Stripe()): lambda q, k: abs(raster(q) - raster(k)) <= 2 or k[0] == 0,
}


@pytest.mark.parametrize("pattern", DEFINITIONS, ids=repr)
def test_rule_is_the_definition(pattern: Pattern) -> None:
    places = [(t, h, w) for t in range(4) for h in range(5) for w in range(6)]
    keeps = DEFINITIONS[pattern]
    expected = torch.tensor([[keeps(q, k) for k in places] for q in places])
    index = torch.arange(120)
    assert torch.equal(pattern.allows(index[:, None], index, TokenLayout(GRID)), expected)


def test_text_and_other_grids_are_kept() -> None:
    layout = TokenLayout(segments=[Segment("text", 3), GRID, Segment("prefix", 2), GRID])
    index = torch.arange(layout.length)
    kept = Diagonal(1).allows(index[:, None], index, layout)
    first, second = slice(3, 123), slice(125, 245)
    inside = torch.zeros_like(kept)
    inside[first, first] = True
    inside[second, second] = True
    assert bool(kept[~inside].all())
    assert not bool(kept[first, first].all()) and torch.equal(
        kept[first, first], kept[second, second]
    )
    assert not bool(Skip().allows(index[:, None], index, layout).any())


def test_sharded_heads_take_different_shards() -> None:
    """S2-Attention's step of max(1, stride // heads)."""
    assert [p.shard for p in Sharded(2, 8).for_heads(4)] == [0, 2, 4, 6]
    assert [p.shard for p in Sharded(2, 3).for_heads(5)] == [0, 1, 2, 0, 1]


def test_scattered_columns_are_brought_to_the_front() -> None:
    stripe = Stripe(False, tuple(range(0, 4096, 64)))
    block_map = stripe.lower(TokenLayout(Grid(4, 32, 32)), 64, 64)
    assert block_map.num_visited == 64  # one key block a row, where raster order would touch 64
    assert block_map.num_partial == 0


def test_stencil_of_block_tiles_has_full_blocks_only() -> None:
    block_map = Stencil((2, 8, 8), ((0, 0, 0), (1, 0, 0), (0, 1, -1)), (3,)).lower(
        TokenLayout(Grid(8, 32, 40))
    )
    assert block_map.num_partial == 0 and not block_map.needs_bits
