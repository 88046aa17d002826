"""A pattern on one grid: each form is computed once, however often it is asked for."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar

import pytest
import torch
from support.cases import LAYOUTS, draw

from visattn import Grid, TokenLayout
from visattn.blocks.predicates import Band
from visattn.geometry.orders import LineOrder
from visattn.patterns import PATTERNS, Diagonal, Pattern, Stencil, Union

FORMS = ("predicates", "axis_rules", "orders", "covered", "windows", "pairs", "table")


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """Count the calls of each form, by form, pattern and grid."""
    counter: Counter = Counter()

    def counted(form, method):
        def run(self, *args):
            counter[(form, self, *args)] += 1
            return method(self, *args)

        return run

    for kind in {base for pattern in PATTERNS.values() for base in pattern.__mro__}:
        for form in FORMS:
            method = vars(kind).get(form)
            if callable(method):
                monkeypatch.setattr(kind, form, counted(form, method))
    return counter


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PATTERNS)
def test_one_lowering_asks_for_each_form_once(name, calls):
    asked = set()
    for number, layout in enumerate(list(LAYOUTS.values())[::6]):
        pattern = draw(name, layout, 1000 + number)
        calls.clear()
        pattern.lower(layout, 16, 32)
        pattern.density(layout)
        pattern.lower(layout, 16, 32)
        asked |= {form for form, *_ in calls}
        # the windows of a neighborhood give its rules, and the cuts of boxes for each pair of sizes
        windows = {call: calls.pop(call) for call in list(calls) if call[0] == "windows"}
        assert all(count <= 3 for count in windows.values())
        assert {call: count for call, count in calls.items() if count > 1} == {}
    assert {"predicates", "pairs"} <= asked


def test_equal_patterns_share_their_forms_and_forms_are_frozen():
    grid = Grid(3, 4, 7)
    on_grid = Diagonal(5).on(grid)
    assert Diagonal(5).on(Grid(3, 4, 7)) is on_grid
    assert Diagonal(5).on(Grid(3, 7, 4)) is not on_grid
    assert on_grid.predicates is on_grid.predicates
    with pytest.raises(FrozenInstanceError):
        on_grid.grid = grid


def test_an_error_is_raised_at_every_access():
    for _ in range(2):
        with pytest.raises(ValueError, match="must be below the 8 tokens"):
            _ = Diagonal(9).on(Grid(2, 2, 2)).predicates
        with pytest.raises(ValueError, match="leaves 4 of the 8 queries"):
            Stencil(1, ((1, 0, 0),)).on(Grid(2, 2, 2)).check()


def test_forms_that_are_kept_can_be_used_with_gradients():
    """Tensors made in inference mode cannot be saved for a backward pass."""
    grid = Grid(4, 5, 6)
    with torch.inference_mode():
        pattern = Union(Diagonal(7), Stencil(2, ((0, 0, 0),)))
        on_grid = pattern.on(grid)
        pattern.lower(TokenLayout(grid), 16, 16)
        tables = [p.table for p in on_grid.predicates if hasattr(p, "table")]
    assert tables and not any(table.is_inference() for table in tables)
    assert on_grid.predicates[0].low == -7


def test_a_class_that_is_defined_again_does_not_get_the_forms_of_the_first():
    def define(width: int) -> type[Pattern]:
        @dataclass(frozen=True, eq=False)
        class Near(Pattern, register=False):
            name: ClassVar[str] = "near"

            def keeps(self, q, k, grid):
                return (q[2] - k[2]).abs() <= width

            def pairs(self, grid):
                return width

            def predicates(self, grid):
                return (Band((0, 0, 1), -width, width),)

            def orders(self, grid, block_q, block_k):
                return LineOrder(), LineOrder()

        return Near

    grid = Grid(1, 1, 9)
    first, second = define(1)(), define(2)()
    assert repr(first) == repr(second)
    assert (first.on(grid).pairs, second.on(grid).pairs) == (1, 2)
    gc.collect()
