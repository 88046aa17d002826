"""Rows, banks and the cache of block maps, and the exchange with FlexAttention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from visattn import Grid, Segment, TokenLayout, sparse_attention
from visattn.attention.backends.reference import map_mask, pattern_mask
from visattn.attention.lowering import MAPS, lower_cached
from visattn.blocks.bank import MapBank
from visattn.blocks.block_map import FULL, NONE, PARTIAL, SHORT, TEXT, pack_rows
from visattn.blocks.cache import MapCache
from visattn.flex import from_block_mask, to_block_mask
from visattn.geometry.orders import LineOrder
from visattn.patterns import (
    Block,
    Dense,
    Diagonal,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    Sharded,
    Stencil,
    Stripe,
    Union,
)

LAYOUT = TokenLayout(Grid(4, 8, 8), text_after=37)


def test_rows_list_full_then_text_then_short_then_partial() -> None:
    status = torch.tensor(
        [[PARTIAL, FULL, NONE, SHORT, FULL, TEXT], [NONE, NONE, PARTIAL, NONE, NONE, NONE]]
    )
    bounds, columns = pack_rows(status.byte())
    assert bounds.tolist() == [[0, 2, 3, 4, 5], [5, 5, 5, 5, 6]]
    assert columns.tolist() == [1, 4, 5, 3, 0, 2] and columns.dtype == torch.int16


def test_status_reads_the_rows_back() -> None:
    block_map = Diagonal(40).lower(LAYOUT, 32, 16)
    bounds, columns = pack_rows(block_map.status())
    assert torch.equal(bounds, block_map.bounds) and torch.equal(columns, block_map.columns)


def test_full_text_blocks_stand_apart_from_full_ones() -> None:
    block_map = Dense().lower(LAYOUT, 32, 32)
    assert block_map.status()[0].tolist() == [FULL] * 8 + [TEXT, SHORT]
    assert block_map.block_density == pytest.approx(100 / 100)


def test_block_density_counts_what_is_executed() -> None:
    aligned = TokenLayout(Grid(4, 8, 8))
    assert Dense().lower(aligned, 32, 32).block_density == 1.0
    assert Diagonal(0).lower(aligned, 32, 32).block_density == 1 / 8
    assert Diagonal(0).density(aligned) == 1 / 256


def test_bits_are_needed_where_no_predicate_says_it() -> None:
    layout = TokenLayout(Grid(4, 8, 8))
    assert not Neighborhood((3, 3, 3)).lower(layout, 32, 32).needs_bits
    assert not Union(Diagonal(3), Stripe(False, (5,))).lower(layout, 32, 32).needs_bits
    assert Union(Diagonal(3), Stripe(False, (5,)), Neighborhood(3)).lower(layout, 32, 32).needs_bits
    assert Sharded(1, 2, block=48).lower(layout, 32, 32).needs_bits
    assert not Sharded(1, 2, block=64).lower(layout, 32, 32).needs_bits  # nested: full blocks only


def test_tiles_are_kept_once() -> None:
    tiles, index = Diagonal(5).lower(TokenLayout(Grid(1, 1, 640)), 32, 32).tiles
    assert len(index) == 58 and len(tiles) == 3  # on, above and below the diagonal


def test_bank_holds_distinct_maps_once() -> None:
    maps = [
        lower_cached(p, LAYOUT, None, 32, 32)
        for p in (Diagonal(9), Dense(), Diagonal(9), MultiDiagonal(9))
    ]
    bank = MapBank.of(maps)
    assert len(bank.maps) == 3 and bank.head_map.tolist() == [0, 1, 0, 2]
    for head, own in enumerate(maps):
        number = int(bank.head_map[head])
        for row, (begin, _, _, _, end) in enumerate(
            bank.bounds[number, : len(own.bounds)].tolist()
        ):
            first, last = own.bounds[row, 0], own.bounds[row, 4]
            assert torch.equal(bank.columns[begin:end], own.columns[first:last])
        assert torch.equal(bank.q_table[number, : len(own.q_blocks), 0].long(), own.q_blocks.start)
        assert torch.equal(bank.k_table[number, : len(own.k_blocks), 1].long(), own.k_blocks.length)


def test_bank_refuses_maps_that_differ_in_blocks() -> None:
    with pytest.raises(ValueError, match="one bank takes one of each"):
        MapBank.of([Dense().lower(LAYOUT, 32, 32), Dense().lower(LAYOUT, 16, 16)])
    with pytest.raises(ValueError, match=r"heads=\(\) is empty"):
        MapBank.of([])


def test_cache_shares_maps_and_keeps_its_limit() -> None:
    cache = MapCache(limit_bytes=30_000)
    made = []

    def make(width: int) -> object:
        made.append(width)
        return Diagonal(width).lower(LAYOUT, 8, 8)

    first = cache.get(1, lambda: make(1))  # type: ignore[arg-type, return-value]
    assert cache.get(1, lambda: make(1)) is first and made == [1]  # type: ignore[arg-type, return-value]
    for width in range(2, 40):
        cache.get(width, lambda width=width: make(width))  # type: ignore[misc]
    assert cache.nbytes <= 30_000 and 0 < len(cache) < 39
    cache.get(1, lambda: make(1))  # type: ignore[arg-type, return-value]
    assert made.count(1) == 2  # it was the least recently used


def test_cache_is_keyed_by_layout() -> None:
    """A map of one resolution must not serve another."""
    MAPS.clear()
    maps = {lower_cached(Radial(), TokenLayout(Grid(t, 8, 8)), None, 32, 32) for t in (2, 3, 4)}
    assert len(maps) == 3 and {m.layout.grids[0][1].frames for m in maps} == {2, 3, 4}


@pytest.mark.parametrize(
    "pattern",
    [
        Dense(),
        Diagonal(40),
        MultiDiagonal(9),
        Stripe(),
        Radial(rule="token"),
        Union(Diagonal(5), Stripe(False, (3,))),
    ],
    ids=repr,
)
def test_flex_attention_computes_the_map(pattern: Pattern) -> None:
    block_map = pattern.lower(LAYOUT, 64, 64, order=LineOrder())
    block_mask = to_block_mask(block_map)
    q, k, v = (
        torch.randn(1, 1, LAYOUT.length, 16, generator=torch.Generator().manual_seed(i))
        for i in range(3)
    )
    out = flex_attention(q, k, v, block_mask=block_mask)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(
        out, sparse_attention(q, k, v, pattern, LAYOUT, backend="reference"), rtol=0, atol=2e-6
    )
    back = from_block_mask(block_mask, LAYOUT)
    assert torch.equal(back.status(), block_map.status())
    assert torch.equal(map_mask(back), pattern_mask(pattern, LAYOUT))


def test_a_foreign_block_mask_becomes_a_map() -> None:
    block_mask = create_block_mask(
        lambda b, h, q, k: (q - k).abs() < 30 + h,
        None,
        2,
        LAYOUT.length,
        LAYOUT.length,
        device="cpu",
        BLOCK_SIZE=64,
    )
    place = torch.arange(LAYOUT.length)
    for head in range(2):
        block_map = from_block_mask(block_mask, LAYOUT, head=head)
        assert block_map.needs_bits
        assert torch.equal(map_mask(block_map), (place[:, None] - place).abs() < 30 + head)


def test_flex_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="not cut into equal blocks of 64"):
        to_block_mask(Dense().lower(TokenLayout(Grid(1, 5, 7), text_before=9), 64, 64))
    block_mask = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu", BLOCK_SIZE=32
    )
    two = create_block_mask(
        lambda b, h, q, k: q >= k, None, 2, LAYOUT.length, LAYOUT.length, device="cpu"
    )
    with pytest.raises(ValueError, match="head=7 must be from 0 to 1"):
        from_block_mask(two, LAYOUT, head=7)
    with pytest.raises(ValueError, match=r"block_mask is for \(64, 64\) tokens"):
        from_block_mask(block_mask, LAYOUT)
    with pytest.raises(ValueError, match="not cut into equal blocks of 32"):
        from_block_mask(block_mask, TokenLayout(segments=[Segment("text", 8), Grid(1, 7, 8)]))


TWO_IMAGES = TokenLayout(segments=[Grid(1, 64, 64), Grid(1, 64, 64)])


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        (Block((1, 7, 7)), TWO_IMAGES),
        (Neighborhood((1.0, 0.1, 0.1)), TWO_IMAGES),
        (Neighborhood(1.0), TokenLayout(Grid(5, 30, 52))),
        (Stencil((1, 1, 1), ((0, 0, 0),), tuple(range(0, 1200, 11))), TokenLayout(Grid(5, 15, 16))),
    ],
    ids=repr,
)
def test_boxes_are_left_for_raster_order_where_that_visits_fewer(
    pattern: Pattern, layout: TokenLayout
) -> None:
    """Small boxes are many, and queries of another grid meet every one of them."""
    own = pattern.lower(layout, 64, 64)
    raster = pattern.lower(layout, 64, 64, order=LineOrder())
    assert own.num_visited <= raster.num_visited
    assert own.block_density <= 1.02
