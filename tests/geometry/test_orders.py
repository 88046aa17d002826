"""Orders are permutations, and their blocks bound the tokens they hold."""

from __future__ import annotations

import pytest
import torch
from support.cases import LAYOUTS

from visattn import Grid, TokenLayout
from visattn.geometry.orders import (
    BoxOrder,
    ExplicitOrder,
    HilbertOrder,
    LineOrder,
    Order,
    axis_cells,
    axis_permutation,
    fitted,
    sequence_blocks,
)

GRIDS = [Grid(1, 1, 1), Grid(1, 1, 9), Grid(5, 1, 3), Grid(1, 7, 7), Grid(3, 5, 7), Grid(4, 4, 8)]
ORDERS: list[Order] = [
    *(LineOrder(axes) for axes in ("thw", "twh", "htw", "hwt", "wth", "wht")),
    BoxOrder((2, 2, 4)),
    BoxOrder((1, 4, 4), unit=(0, 3, 3), offset=(0, 1, 2)),
    BoxOrder((2, 2, 4), dilation=(1, 2, 3)),
    BoxOrder((1, 6, 2), unit=(0, 3, 0)),
    HilbertOrder(),
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_cover_the_grid_and_bound_their_tokens(order: Order, grid: Grid) -> None:
    index = order.index(grid)
    assert torch.equal(index.sort().values, torch.arange(grid.numel))
    blocks = order.blocks(grid, 16)
    assert int(blocks.length.max()) <= 16 and int(blocks.length.sum()) == grid.numel
    assert torch.equal(blocks.start, blocks.length.cumsum(0) - blocks.length)
    places = torch.stack(grid.coordinates(index), 1)
    for start, length, low, high in zip(
        blocks.start, blocks.length, blocks.low, blocks.high, strict=True
    ):
        own = places[start : start + length]
        assert bool((own >= low).all()) and bool((own <= high).all())
        assert bool(((own - low) % torch.tensor(blocks.step) == 0).all())
        if isinstance(order, BoxOrder):  # a box is its bounds, whole
            assert int(((high - low) // torch.tensor(blocks.step) + 1).prod()) == length


@pytest.mark.parametrize(
    "grid", [Grid(8, 8, 8), Grid(1, 16, 16), Grid(4, 4, 4), Grid(1, 1, 32)], ids=str
)
def test_hilbert_curve_moves_one_step_at_a_time(grid: Grid) -> None:
    places = torch.stack(grid.coordinates(HilbertOrder().index(grid)), 1)
    assert places.diff(dim=0).abs().sum(1).unique().tolist() == [1]


def test_line_order_nests_the_axes() -> None:
    places = torch.stack(Grid(2, 3, 4).coordinates(LineOrder("hwt").index(Grid(2, 3, 4))), 1)
    keys = (places[:, 1] * 4 + places[:, 2]) * 2 + places[:, 0]
    assert torch.equal(keys, torch.arange(24))


@pytest.mark.parametrize("axes", ["hwt", "wth", "htw"])
@pytest.mark.parametrize(
    "order", [LineOrder("twh"), ExplicitOrder(tuple(reversed(range(105))))], ids=str
)
def test_order_of_a_permuted_grid(order: Order, axes: str) -> None:
    grid, permutation = Grid(3, 5, 7), axis_permutation(axes)
    back = LineOrder(axes).index(grid)  # raster index in the permuted grid -> in the grid
    assert torch.equal(
        order.permuted(permutation, grid).index(grid), back[order.index(grid.permuted(permutation))]
    )


def test_axis_cells() -> None:
    assert axis_cells(10, 4).tolist() == [[0, 3], [4, 7], [8, 9]]
    assert axis_cells(10, 4, unit=6).tolist() == [[0, 3], [4, 5], [6, 9]]
    assert axis_cells(10, 4, unit=4, offset=1).tolist() == [[0, 0], [1, 4], [5, 8], [9, 9]]
    assert axis_cells(10, 6, unit=3, offset=0).tolist() == [[0, 5], [6, 9]]
    assert axis_cells(7, 2, dilation=2).tolist() == [[0, 2], [4, 6], [1, 3], [5, 5]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_segments_never_share_a_block(name: str) -> None:
    layout = LAYOUTS[name]
    blocks = sequence_blocks(layout, (LineOrder("wth"),) * len(layout.grids), 16)
    owner = torch.cat([torch.full((s.length,), n) for n, s in enumerate(layout.segments)])
    tokens, exists = blocks.tokens(torch.arange(len(blocks)))
    assert torch.equal(tokens[exists].sort().values, torch.arange(layout.length))
    for row, kept, segment in zip(tokens, exists, blocks.segment, strict=True):
        assert owner[row[kept]].unique().tolist() == [int(segment)]


def test_identity_order_has_no_index() -> None:
    layout = TokenLayout(Grid(2, 3, 4), text_after=3)
    assert sequence_blocks(layout, (LineOrder(),), 8).index is None
    assert sequence_blocks(layout, (LineOrder("hwt"),), 8).index is not None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LineOrder("xyz"), "order='xyz' must hold each of the letters"),
        (lambda: LineOrder("tth"), "order='tth' must hold"),
        (
            lambda: BoxOrder((4, 4, 4)).blocks(Grid(4, 4, 4), 32),
            "holds 64 tokens, more than a block of 32",
        ),
        (
            lambda: ExplicitOrder((0, 1, 1)).index(Grid(1, 1, 3)),
            "must be a permutation of the 3 tokens",
        ),
        (lambda: ExplicitOrder((0, 1)).index(Grid(1, 1, 3)), "raster holds 2 places"),
    ],
)
def test_bad_orders_get_one_sentence(make: object, sentence: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=sentence):
        make()


def test_fitted_cuts_evenly_and_grows_into_short_axes() -> None:
    assert fitted((8, 4, 2), Grid(9, 16, 16), 64) == (5, 4, 2)
    assert fitted((4, 4, 4), Grid(9, 16, 16), 64) == (3, 4, 4)
    assert fitted((1, 8, 8), Grid(9, 16, 16), 64) == (1, 8, 8)
    assert fitted((16, 2, 2), Grid(1, 32, 32), 64) == (1, 8, 8)
