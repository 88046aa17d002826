"""The sample of query rows, and their exact softmax without a map of all pairs."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visattn import Grid, Segment, TokenLayout
from visattn.readout import (
    Measures,
    Sampler,
    Tiling,
    attention_rows,
    default_tilings,
    draw_rows,
)

GRIDS = [
    Grid(1, 1, 1),
    Grid(7, 1, 1),
    Grid(1, 13, 9),
    Grid(3, 6, 4),
    Grid(5, 7, 3),
    Grid(9, 16, 16),
    Grid(17, 16, 16),
    Grid(21, 30, 52),
    Grid(13, 30, 45),
]


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    bytes_ = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes_ = max(self.bytes_, leaf.untyped_storage().nbytes())
        return out


# ---- tilings


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_default_tilings_fit_the_grid(grid):
    tilings = default_tilings(grid)
    assert len(set(tilings)) == len(tilings)
    for tiling in tilings:
        assert tiling.size <= 64
        blocks = tiling.blocks(TokenLayout(grid, text_after=70))
        count = tiling.count(grid)
        assert int((blocks.segment == 0).sum()) == count.numel
        if isinstance(tiling.tile, tuple) and grid.numel > 2000:
            assert grid.numel >= 0.7 * count.numel * tiling.size  # tiles are about equally full


@pytest.mark.parametrize("tile", [(1, 2), (0, 1, 1), 0, -3, "1x8x8", 2.0, True, (1, 2, True)])
def test_wrong_tiles_are_refused(tile):
    with pytest.raises((TypeError, ValueError), match="tile="):
        Tiling(tile)


def test_names():
    assert [Tiling((1, 8, 8)).name, Tiling(64).name] == ["1x8x8", "run 64"]


# ---- the draw


LAYOUT = TokenLayout(segments=[Segment("text", 5), Grid(5, 7, 3), Segment("prefix", 2)])
TILINGS = (Tiling((2, 3, 2)), Tiling(8))


def test_rows_are_those_of_whole_tiles():
    sample = draw_rows(LAYOUT, TILINGS, tiles=3)
    assert torch.equal(sample.tokens, sample.tokens.unique())
    seen = set()
    for tiling, tiles in zip(TILINGS, sample.samples, strict=True):
        assert tiles.tiling == tiling
        assert len(tiles.tiles) == len(set(tiles.tiles.tolist())) == 3
        for number, tile in enumerate(tiles.tiles.tolist()):
            tokens, exists = tiles.blocks.tokens(torch.tensor([tile]))
            own = sample.tokens[tiles.members[number][tiles.exists[number]]]
            assert torch.equal(own, tokens[exists])
            seen.update(own.tolist())
    assert seen == set(sample.tokens.tolist())
    t, h, w = sample.places
    assert torch.equal(5 + (t * 7 + h) * 3 + w, sample.tokens)


def test_as_many_tiles_as_there_are_is_every_token_of_the_grid():
    for tiles in (18, 1000):
        sample = draw_rows(LAYOUT, TILINGS, tiles=tiles)
        assert sample.tokens.tolist() == list(range(5, 110))


def test_same_seed_same_rows():
    first, again, other = (draw_rows(LAYOUT, TILINGS, tiles=3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_every_tile_is_drawn_as_often():
    """5 tiles, 2 drawn: arcs of 2 and 3 tiles, which a turn of the ring makes fair."""
    layout = TokenLayout(Grid(1, 1, 10))
    count = Counter()
    for seed in range(1000):
        count.update(draw_rows(layout, [Tiling(2)], tiles=2, seed=seed).samples[0].tiles.tolist())
    assert all(340 < count[tile] < 460 for tile in range(5))


def test_tiles_are_spread():
    """Of 512 tiles in a cube 8 are drawn; in each half of the cube along any axis lie some."""
    grid = Grid(8, 8, 8)
    for seed in range(50):
        sample = draw_rows(TokenLayout(grid), [Tiling((1, 1, 1))], tiles=8, seed=seed)
        for axis in sample.places:
            assert 1 <= int((axis < 4).sum()) <= 7


def test_some_rows_of_each_tile():
    sample = draw_rows(LAYOUT, TILINGS, tiles=18, rows_per_tile=3)
    for tiling in sample.samples:
        whole = tiling.blocks.length[tiling.tiles]
        assert torch.equal(tiling.exists.sum(1), whole.clamp(max=3))
        for number, tile in enumerate(tiling.tiles.tolist()):
            tokens, exists = tiling.blocks.tokens(torch.tensor([tile]))
            own = sample.tokens[tiling.members[number][tiling.exists[number]]]
            assert len(own.unique()) == len(own)
            assert torch.isin(own, tokens[exists]).all()


def test_the_second_grid_can_be_sampled():
    layout = TokenLayout(segments=[Grid(2, 3, 4), Segment("text", 3), Grid(1, 6, 5)])
    sample = draw_rows(layout, [Tiling((1, 2, 2))], tiles=99, number=1)
    assert sample.tokens.tolist() == list(range(27, 57))
    assert (sample.grid, sample.start) == (Grid(1, 6, 5), 27)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiles": 0}, "tiles=0"),
        ({"tiles": 2.0}, "tiles=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"rows_per_tile": 0}, "rows_per_tile=0"),
        ({"number": 1}, "number=1 must be below the 1 grids"),
        ({"tilings": ()}, "at least one Tiling"),
        ({"tilings": [(1, 2, 2)]}, "at least one Tiling"),
    ],
)
def test_wrong_draws_are_refused(options, words):
    options = {"tilings": TILINGS, **options}
    with pytest.raises((TypeError, ValueError), match=words):
        draw_rows(LAYOUT, options.pop("tilings"), **options)


# ---- the softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("max_bytes", [1, 2000, 10**7])
def test_rows_are_the_softmax(dtype, heads, groups, max_bytes):
    """As near to float64 as torch's own float32 softmax, in chunks of any size."""
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(heads, 61, 24, generator=generator).mul(3).to(dtype)
    k = torch.randn(groups, 61, 24, generator=generator).to(dtype)
    rows = torch.tensor([0, 3, 4, 17, 60])
    shared = k.repeat_interleave(heads // groups, 0)
    for scale in (None, 0.5):
        factor = 24**-0.5 if scale is None else scale
        exact = q[:, rows].double() @ shared.double().transpose(1, 2) * factor
        eager = (q[:, rows].float() @ shared.float().transpose(1, 2) * factor).softmax(-1)
        bound = 2 * (eager - exact.softmax(-1)).abs().max() + 2**-22
        weights = torch.full((heads, len(rows), 61), torch.nan)
        lse = torch.full((heads, len(rows)), torch.nan)
        for chunk in attention_rows(q, k, rows, scale=scale, max_bytes=max_bytes):
            assert chunk.weights.dtype == chunk.lse.dtype == torch.float32
            weights[chunk.heads, chunk.rows] = chunk.weights
            lse[chunk.heads, chunk.rows] = chunk.lse
        assert (weights - exact.softmax(-1)).abs().max() <= bound
        assert (lse - exact.logsumexp(-1)).abs().max() <= 1e-5 * exact.abs().max()


def test_huge_logits_do_not_overflow():
    q = torch.full((1, 4, 8), 1e4)
    (chunk,) = attention_rows(q, q, torch.arange(4))
    assert torch.equal(chunk.weights, torch.full((1, 4, 4), 0.25))
    assert torch.isfinite(chunk.lse).all()


@pytest.mark.parametrize("shape", [(3, 9, 8), (2, 9, 4), (9, 8)])
def test_keys_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match="must be \\[H, L, D\\]"):
        list(attention_rows(torch.zeros(2, 9, 8), torch.zeros(shape), torch.arange(2)))


# ---- memory


@pytest.mark.parametrize("grid", [Grid(8, 16, 16), Grid(16, 16, 32)], ids=str)
def test_nothing_of_size_n_squared_is_made(grid):
    """Neither when rows are read nor when they are measured; at 8,192 tokens a map of one head has
    268 MB."""
    layout, limit = TokenLayout(grid, text_after=20), 2 << 20
    q, k = (torch.randn(2, layout.length, 16) for _ in range(2))
    sample = draw_rows(layout, default_tilings(grid), tiles=2)
    measures = Measures(sample)
    with Largest() as largest:
        measures(attention_rows(q, k, sample.tokens, max_bytes=limit), 2)
    assert limit / 2 < largest.bytes_ <= limit
    with Largest() as largest:
        for chunk in attention_rows(q, k, torch.arange(0, layout.length, 4), max_bytes=limit):
            assert chunk.weights.nbytes <= limit
    assert largest.bytes_ <= limit


def test_default_bound_is_that_of_the_sampler():
    assert Sampler().max_bytes == 64 << 20
