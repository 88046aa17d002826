"""One file adds a selector: a class that is defined here is parsed, walked, run and searched."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support.selectors_oracle import LAYOUTS, SCALE, lengths, tensors

from visattn import sparse_attention
from visattn.geometry.layout import TokenLayout
from visattn.patterns import HeadPattern, parse_pattern
from visattn.patterns.base.head_pattern import unregister
from visattn.plan import Plan, Rule
from visattn.search.candidates.dynamic import dynamic_families
from visattn.selectors import SELECTORS, BlockSelector, methods
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend
from visattn.selectors.selector import Stages
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.scores import Bounds


@pytest.fixture
def kind() -> Iterator[type[BlockSelector]]:
    before = dict(SELECTORS)

    @dataclass(frozen=True, eq=False)
    class HighestBounds(BlockSelector):
        """The blocks whose keys can have the largest logits."""

        __qualname__ = "HighestBounds"  # as for a class of a module

        keep: int | float = 0.25
        block: int = 64
        name: ClassVar[str] = "highest_bounds"
        color: ClassVar[str] = "#123456"
        example: ClassVar[str] = "highest_bounds(0.3, 8)"
        row_independent: ClassVar[bool] = True

        @classmethod
        def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
            return {"largest bounds": [cls(keep, block) for keep in (0.1, 0.3)]}

        def stages(self, layout: TokenLayout) -> Stages:
            return Stages(Bounds(), TopK(self.keep), blocks=(self.block, self.block))

    yield HighestBounds
    unregister(HighestBounds)
    assert dict(SELECTORS) == before


def test_it_is_written_and_read(kind: type[BlockSelector]) -> None:
    assert SELECTORS["highest_bounds"] is kind
    pattern = parse_pattern(kind.example)
    assert type(pattern) is kind and parse_pattern(repr(pattern)) == pattern
    plan = Plan((Rule(pattern),))
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_it_runs(kind: type[BlockSelector], layout: TokenLayout) -> None:
    pattern = parse_pattern(kind.example)
    assert isinstance(pattern, BlockSelector)
    q, k, v = tensors(layout)
    selection = pattern.select(q, k, v, layout, SCALE)
    call = (q, k, v, selection, layout, lengths(layout), SCALE)
    out, _ = attend(*call)
    torch.testing.assert_close(out, reference_attend(*call)[0])
    given = {"text_lengths": lengths(layout), "scale": SCALE}
    public = sparse_attention(q, k, v, pattern, layout, backend="blockwise", **given)
    torch.testing.assert_close(public, out)


def test_the_search_tries_it(kind: type[BlockSelector]) -> None:
    members = dynamic_families(32)["largest bounds"]
    assert [repr(member) for member in members] == [
        "HighestBounds(keep=0.1, block=32)",
        "HighestBounds(keep=0.3, block=32)",
    ]


def test_without_a_registration_nothing_is_tried() -> None:
    assert "highest_bounds" not in SELECTORS
    assert "largest bounds" not in dynamic_families(32)


def test_every_file_of_methods_is_loaded() -> None:
    names = [m.name for m in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}.")]
    assert len(names) > 25 and set(names) <= set(sys.modules)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_has_a_color_and_an_example(name: str) -> None:
    kind = SELECTORS[name]
    assert "color" in vars(kind) and "example" in vars(kind)
    assert type(parse_pattern(kind.example)) is kind


def test_colors_are_distinct() -> None:
    assert len({kind.color for kind in SELECTORS.values()}) == len(SELECTORS)
