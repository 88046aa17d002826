"""Layouts and pattern parameters that the generic tests walk. One list, used by all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import torch

from visattn import Grid, Segment, TokenLayout
from visattn.patterns import (
    PATTERNS,
    AxisOrder,
    Block,
    Dense,
    Diagonal,
    GridBlocks,
    Halo,
    MultiDiagonal,
    Neighborhood,
    Pattern,
    Radial,
    Sharded,
    ShiftedBlock,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Union,
    parse_pattern,
)

TEXT, PREFIX = Segment("text", 9), Segment("prefix", 5)

# every layout is odd in some way: its name says in which
LAYOUTS: dict[str, TokenLayout] = {
    "one_token": TokenLayout(Grid(1, 1, 1)),
    "one_token_text_1": TokenLayout(Grid(1, 1, 1), text_after=1),
    "one_token_text_7_first": TokenLayout(Grid(1, 1, 1), text_before=7),
    "two_tokens": TokenLayout(Grid(1, 1, 2)),
    "two_frames_of_one": TokenLayout(Grid(2, 1, 1), text_after=3),
    "line_of_5": TokenLayout(Grid(1, 1, 5)),
    "line_of_67": TokenLayout(Grid(1, 1, 67)),
    "column_of_33": TokenLayout(Grid(1, 33, 1), text_before=1),
    "frames_only_13": TokenLayout(Grid(13, 1, 1)),
    "image_7x7": TokenLayout(Grid(1, 7, 7)),
    "image_8x8_text_77": TokenLayout(Grid(1, 8, 8), text_after=77),
    "image_5x13_text_first": TokenLayout(Grid(1, 5, 13), text_before=16),
    "image_13x5": TokenLayout(Grid(1, 13, 5)),
    "image_16x16_aligned": TokenLayout(Grid(1, 16, 16)),
    "image_12x9_prefix_5": TokenLayout(segments=[PREFIX, Grid(1, 12, 9)]),
    "frame_1_of_11x3": TokenLayout(Grid(1, 11, 3), text_after=1),
    "video_2x3x5": TokenLayout(Grid(2, 3, 5)),
    "video_3x3x3": TokenLayout(Grid(3, 3, 3), text_before=2),
    "video_2x8x8_aligned": TokenLayout(Grid(2, 8, 8)),
    "video_4x4x4_text_64": TokenLayout(Grid(4, 4, 4), text_after=64),
    "video_4x4x8_aligned": TokenLayout(Grid(4, 4, 8)),
    "video_5x5x5": TokenLayout(Grid(5, 5, 5)),
    "video_7x4x6": TokenLayout(Grid(7, 4, 6)),
    "video_7x5x3_text_31": TokenLayout(Grid(7, 5, 3), text_after=31),
    "video_3x7x11": TokenLayout(Grid(3, 7, 11)),
    "video_9x4x5_text_first_17": TokenLayout(Grid(9, 4, 5), text_before=17),
    "video_17x2x4": TokenLayout(Grid(17, 2, 4)),
    "video_33x1x3": TokenLayout(Grid(33, 1, 3), text_after=5),
    "video_2x13x9": TokenLayout(Grid(2, 13, 9)),
    "video_6x6x7_both_texts": TokenLayout(Grid(6, 6, 7), text_before=3, text_after=11),
    "video_3x12x8": TokenLayout(Grid(3, 12, 8), text_after=33),
    "video_2x12x12_frame_144": TokenLayout(Grid(2, 12, 12)),
    "video_3x11x13_frame_143": TokenLayout(Grid(3, 11, 13), text_after=1),
    "two_grids_same": TokenLayout(segments=[Grid(1, 6, 7), Grid(1, 6, 7)]),
    "two_grids_text_first": TokenLayout(segments=[TEXT, Grid(1, 6, 5), Grid(1, 3, 8)]),
    "two_grids_text_between": TokenLayout(segments=[Grid(2, 4, 5), TEXT, Grid(3, 4, 4)]),
    "three_grids": TokenLayout(segments=[Grid(1, 4, 4), Grid(1, 5, 3), Grid(2, 3, 3), TEXT]),
    "two_texts_two_grids": TokenLayout(segments=[TEXT, Grid(2, 3, 4), TEXT, Grid(2, 3, 4)]),
    "prefix_and_text": TokenLayout(segments=[PREFIX, Grid(3, 5, 4), TEXT]),
    "prefix_behind": TokenLayout(segments=[Grid(2, 5, 6), PREFIX]),
    "video_5x9x10_wide": TokenLayout(Grid(5, 9, 10), text_after=2),
    "video_8x8x8_aligned": TokenLayout(Grid(8, 8, 8)),
    "video_4x11x7_unaligned": TokenLayout(Grid(4, 11, 7), text_before=19),
}


def least_grid(layout: TokenLayout) -> Grid:
    """The smallest extent of each axis over the grids of a layout: what fits in it fits
    everywhere."""
    t, h, w = (min(grid.shape[axis] for _, grid in layout.grids) for axis in range(3))
    return Grid(t, h, w)


def _sizes(rng: random.Random, grid: Grid, most: int = 99) -> tuple[int | float, ...]:
    return tuple(
        rng.choice([0.2, 0.5, 1.0, 1.7])
        if rng.random() < 0.2
        else rng.randint(1, min(length, most))
        for length in grid.shape
    )


def _neighborhood(rng: random.Random, grid: Grid) -> Pattern:
    window = [rng.randint(1, length) for length in grid.shape]
    dilation = tuple(
        rng.randint(1, max(1, length // size))
        for length, size in zip(grid.shape, window, strict=True)
    )
    stride = tuple(rng.randint(1, size) for size in window)
    causal = tuple(rng.random() < 0.3 for _ in range(3))
    kept = tuple(
        1.0 if rng.random() < 0.15 and step == 1 else size
        for size, step in zip(window, dilation, strict=True)
    )
    return Neighborhood(kept, stride, dilation, causal)


def _stripe(rng: random.Random, grid: Grid) -> Pattern:
    columns: list[int | float | tuple[int, int]] = [
        rng.randrange(grid.numel) for _ in range(rng.randint(0, 3))
    ]
    if rng.random() < 0.4:
        begin = rng.randrange(grid.numel)
        columns.append((begin, rng.randint(begin + 1, grid.numel)))
    if rng.random() < 0.3:
        columns.append(rng.random() * 0.99 + 0.01)
    return Stripe(not columns or rng.random() < 0.5, tuple(columns) or None)


def _sliding_tile(rng: random.Random, grid: Grid) -> Pattern:
    tile = tuple(rng.randint(1, length) for length in grid.shape)
    counts = [-(-length // side) for length, side in zip(grid.shape, tile, strict=True)]
    return SlidingTile(tile, tuple(rng.choice([rng.randint(1, count), 0.5]) for count in counts))


def _shifted(rng: random.Random, grid: Grid) -> Pattern:
    size = tuple(rng.randint(1, length) for length in grid.shape)
    return ShiftedBlock(size, rng.choice([None, tuple(rng.randint(0, side - 1) for side in size)]))


def _stencil(rng: random.Random, grid: Grid) -> Pattern:
    tile = tuple(rng.randint(1, length) for length in grid.shape)
    offsets = [(0, 0, 0)] + [
        (rng.randint(-3, 3), rng.randint(-2, 2), rng.randint(-2, 2)) for _ in range(5)
    ]
    tiles = 1
    for length, side in zip(grid.shape, tile, strict=True):
        tiles *= -(-length // side)
    columns = tuple(rng.randrange(tiles) for _ in range(rng.randint(0, 2)))
    return Stencil(tile, tuple(offsets[1:] if columns else offsets), columns)


def _sharded(rng: random.Random, grid: Grid) -> Pattern:
    stride = rng.randint(1, 4)
    return Sharded(
        rng.randint(1, 3), stride, rng.randrange(stride), rng.choice([32, 48]), rng.random() < 0.5
    )


def _permuted(rng: random.Random, grid: Grid) -> Pattern:
    order = rng.choice(["thw", "twh", "htw", "hwt", "wth", "whd".replace("d", "t")])
    axes = ["thw".index(letter) for letter in order]
    inner = grid.permuted((axes[0], axes[1], axes[2]))
    name = rng.choice(sorted(set(DRAWS) - {"axis_order", "skip"}))
    return AxisOrder(DRAWS[name](rng, inner), order)


def _union(rng: random.Random, grid: Grid) -> Pattern:
    names = rng.sample(sorted(set(DRAWS) - {"union", "skip", "dense"}), rng.choice([2, 2, 3]))
    return Union(*(DRAWS[name](rng, grid) for name in names))


def _radial(rng: random.Random, grid: Grid) -> Pattern:
    rule = rng.choice(["block", "token", "paper"])
    return Radial(
        rng.choice([0.2, 0.95, 1, 2.0]), rng.random() < 0.5, rule, rng.choice([32, 64, 128])
    )


DRAWS: dict[str, Callable[[random.Random, Grid], Pattern]] = {
    "dense": lambda rng, grid: Dense(),
    "skip": lambda rng, grid: Skip(),
    "diagonal": lambda rng, grid: Diagonal(rng.choice([0.1, 0.3, rng.randrange(grid.numel)])),
    "multi_diagonal": lambda rng, grid: MultiDiagonal(
        rng.choice([0.1, 0.3, rng.randrange(grid.numel)])
    ),
    "stripe": _stripe,
    "radial": _radial,
    "neighborhood": _neighborhood,
    "sliding_tile": _sliding_tile,
    "block": lambda rng, grid: Block(_sizes(rng, grid)),
    "shifted_block": _shifted,
    "grid_blocks": lambda rng, grid: GridBlocks(_sizes(rng, grid)),
    "halo": lambda rng, grid: Halo(
        _sizes(rng, grid), tuple(rng.randint(0, min(3, n)) for n in grid.shape)
    ),
    "sharded": _sharded,
    "stencil": _stencil,
    "axis_order": _permuted,
    "union": _union,
}
# one typical instance of each pattern, legal on a grid of 6 x 8 x 8 tokens and on larger ones
EXAMPLES: dict[str, Pattern] = {}
for _name, _kind in PATTERNS.items():
    _example = parse_pattern(_kind.example)
    assert isinstance(_example, Pattern) and type(_example) is _kind
    EXAMPLES[_name] = _example
assert set(DRAWS) == set(PATTERNS), "a pattern of the package needs a draw of all its parameters"


def draw_named(name: str, rng: random.Random, grid: Grid) -> Pattern:
    """One of the instances that the class itself names, its example or a member of the search,
    that is legal on the grid. This walks classes that have no entry in ``DRAWS``."""
    kind = PATTERNS[name]
    choices = [parse_pattern(kind.example)]
    for family in kind.search_members(grid, 32).values():
        choices += [family(rng.random()) for _ in range(4)] if callable(family) else family
    rng.shuffle(choices)
    for pattern in choices:
        assert isinstance(pattern, Pattern)
        with suppress(ValueError):
            pattern.check(grid)
            return pattern
    raise ValueError(f"{name} names no instance that is legal on grid {grid}")


def draw(name: str, layout: TokenLayout, seed: int) -> Pattern:
    """A pattern with parameters that are legal on every grid of the layout."""
    rng = random.Random(f"{name} {layout} {seed}")
    if name not in DRAWS:
        return draw_named(name, rng, least_grid(layout))
    return DRAWS[name](rng, least_grid(layout))


def draw_text_lengths(
    layout: TokenLayout, batch: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Valid text lengths per sample, 0 and the capacity included; None without text."""
    if not layout.texts:
        return None
    capacity = torch.tensor([length for _, length in layout.texts])
    lengths = (torch.rand(batch, len(capacity), generator=generator) * (capacity + 1)).long()
    lengths[0] = capacity
    if batch > 1:
        lengths[1] = 0
    return lengths
