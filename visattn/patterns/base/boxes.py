"""Patterns that act axis by axis, and the choice of 3-D tiles for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product

import torch

from visattn.blocks.predicates import Axis, AxisRule
from visattn.geometry.layout import Grid
from visattn.geometry.orders import BoxOrder, Order, Triple, axis_cells, fitted
from visattn.patterns.base.pattern import Pattern

NO_UNIT: Triple = (0, 0, 0)
SEARCHED_PARTS = (1, 2, 3, 4, 6, 8, 12, 16)  # into which the search cuts an axis


class AxisPattern(Pattern):
    """A pattern that keeps a pair when it is kept on every axis: counts and visits multiply."""

    @abstractmethod
    def axis_rules(self, grid: Grid) -> Iterable[AxisRule]:
        """Return for each of the three axes the bounds of the kept keys over the query's
        coordinate."""

    def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
        """Return the unit, offset and dilation at which boxes fit the pattern, per axis."""
        return NO_UNIT, NO_UNIT, (1, 1, 1)

    def pairs(self, grid: Grid) -> int:
        t, h, w = self.rules_on(grid)
        return t.pairs() * h.pairs() * w.pairs()

    def predicates(self, grid: Grid) -> tuple[Axis]:
        t, h, w = self.axis_rules(grid)
        return (Axis((t, h, w)),)

    def orders(self, grid: Grid, block_q: int, block_k: int) -> tuple[Order, Order]:
        rules = self.rules_on(grid)
        return best_boxes(rules, grid, block_q, block_k, *self.cuts(grid))

    def rules_on(self, grid: Grid) -> tuple[AxisRule, AxisRule, AxisRule]:
        """Return ``axis_rules(grid)``, computed once for a grid."""
        (predicate,) = self.on(grid).predicates
        assert isinstance(predicate, Axis)
        return predicate.rules


def side_choices(length: int, unit: int, size: int) -> tuple[int, ...]:
    """Sides of a tile worth trying: divisors of the block, the whole axis, divisors and multiples
    of the unit."""
    sides = {side for side in range(1, size + 1) if size % side == 0}
    sides.add(length)
    if unit:
        sides |= {side for side in range(1, unit + 1) if unit % side == 0} | set(
            range(unit, size + 1, unit)
        )
        sides = {side for side in sides if side < unit or side % unit == 0 or side >= length}
    return tuple(sorted({min(side, length) for side in sides if side <= size}))


def box_candidates(grid: Grid, unit: Triple, size: int) -> list[Triple]:
    """Tiles of at most ``size`` tokens; for each depth and height the widest."""
    t_sides, h_sides, w_sides = (
        side_choices(n, u, size) for n, u in zip(grid.shape, unit, strict=True)
    )
    tiles = []
    for t in t_sides:
        for h in h_sides:
            widths = [w for w in w_sides if t * h * w <= size]
            if widths:
                tiles.append((t, h, widths[-1]))
    return tiles


def coarser(grid: Grid, dilation: Triple, size: int) -> list[Triple]:
    """The dilation, and where its residue classes are less than half a block, those that join
    classes."""
    classes = 1
    for length, step in zip(grid.shape, dilation, strict=True):
        classes *= -(-length // step)
    if 2 * classes > size:
        return [dilation]
    divisors = [[d for d in range(1, step + 1) if step % d == 0] for step in dilation]
    joined = [(t, h, w) for t in divisors[0] for h in divisors[1] for w in divisors[2]]
    volume = [
        -(-grid.frames // t) * -(-grid.height // h) * -(-grid.width // w) for t, h, w in joined
    ]
    return [dilation] + [
        d for d, tokens in zip(joined, volume, strict=True) if size < 2 * tokens <= 2 * size
    ]


def best_boxes(
    rules: Sequence[AxisRule],
    grid: Grid,
    block_q: int,
    block_k: int,
    unit: Triple,
    offset: Triple,
    dilation: Triple,
) -> tuple[Order, Order]:
    """The box orders with which the rule visits the fewest blocks, then the fewest partial ones.

    Visits multiply over axes, so each axis is classified once per pair of sides. Blocks of one size
    get one order.
    """

    @cache
    def visits(number: int, q_side: int, q_step: int, k_side: int, k_step: int) -> tuple[int, int]:
        def cells(side: int, step: int) -> torch.Tensor:
            return axis_cells(grid.shape[number], side, unit[number], offset[number], step)

        rule = rules[number]
        some, every = rule.classify(cells(q_side, q_step), q_step, cells(k_side, k_step), k_step)
        return int(some.sum()), int(every.sum())

    def cost(q: BoxOrder, k: BoxOrder) -> tuple[int, int]:
        visited, whole = 1, 1
        for number in range(3):
            sides = q.tile[number], q.dilation[number], k.tile[number], k.dilation[number]
            some, every = visits(number, *sides)
            visited, whole = visited * some, whole * every
        return visited, visited - whole

    def candidates(size: int) -> list[BoxOrder]:
        """Boxes worth trying; far more boxes than blocks cannot be best."""
        boxes = []
        for step in coarser(grid, dilation, size):
            classes = Grid(*(-(-length // d) for length, d in zip(grid.shape, step, strict=True)))
            for tile in box_candidates(classes, unit, size):
                count = step[0] * step[1] * step[2]
                for side, length in zip(tile, classes.shape, strict=True):
                    count *= -(-length // side)
                if count <= 2 * -(-grid.numel // size) + 64:
                    boxes.append(BoxOrder(tile, unit, offset, step))
        return boxes or [BoxOrder(box_candidates(grid, unit, size)[0], unit, offset, dilation)]

    if block_k == block_q:
        best = min(candidates(block_q), key=lambda q: (*cost(q, q), q.tile, q.dilation))
        return best, best
    q_boxes, k_boxes = candidates(block_q), candidates(block_k)
    pairs = [(q, k) for q in q_boxes for k in k_boxes]
    return min(pairs, key=lambda p: (*cost(*p), p[0].tile, p[1].tile, p[0].dilation, p[1].dilation))


def searched_sides(length: int) -> list[int]:
    """Return the sides of boxes that the search tries on an axis of ``length`` tokens."""
    return sorted({1} | {-(-length // part) for part in SEARCHED_PARTS if part <= length})


def searched_sizes(grid: Grid) -> list[Triple]:
    """Return the sizes of boxes that the search tries on a grid."""
    frames, heights, widths = map(searched_sides, grid.shape)
    return list(product(frames, heights, widths))


def searched_tile(grid: Grid, block: int) -> Triple:
    """Return the tile that the search tries on a grid.

    Args:
        grid: the grid.
        block: tokens of a block.
    """
    return fitted((1, 8, 8) if block >= 64 else (1, 4, 4), grid, block)
