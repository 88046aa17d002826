"""One file adds a pattern: a static and a dynamic one that are defined here are walked, parsed,
listed, drawn, coloured and tried by the search, with no other edit."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.cases import LAYOUTS, draw
from support.cli import good

from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.backends.reference import map_mask, pattern_mask
from visattn.blocks.predicates import AxisRule, Places
from visattn.draw.palette import pattern_colors, rgb
from visattn.draw.plan_picture import draw_plan
from visattn.geometry.orders import Triple
from visattn.patterns import PATTERNS, HeadPattern, parse_pattern
from visattn.patterns.base.boxes import AxisPattern
from visattn.patterns.base.head_pattern import KINDS, unregister
from visattn.patterns.base.pattern import SearchMembers
from visattn.plan import Plan, Rule
from visattn.plan.show.plan_view import view_plan
from visattn.report import render_page
from visattn.search.candidate_choice import CandidateChoice
from visattn.selectors import SELECTORS, BlockSelector
from visattn.selectors.selector import Stages
from visattn.selectors.stages.choose import TopK
from visattn.selectors.stages.scores import Bounds

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("near_rows", "nearest_bounds")


@pytest.fixture(autouse=True)
def kinds() -> Iterator[dict[str, type[HeadPattern]]]:
    before = dict(KINDS)

    @dataclass(frozen=True, eq=False)
    class NearRows(AxisPattern):
        """Keys of the query's frame whose row is at most ``reach`` rows away."""

        __qualname__ = "NearRows"  # as for a class of a module

        reach: int
        name: ClassVar[str] = "near_rows"
        family: ClassVar[str] = "boxes"
        color: ClassVar[str] = "#123456"
        example: ClassVar[str] = "near_rows(2)"

        @classmethod
        def search_members(cls, grid: Grid, block: int) -> dict[str, SearchMembers]:
            return {"near rows": [cls(reach) for reach in (0, 1, 2)]}

        def keeps(self, q: Places, k: Places, grid: Grid) -> torch.Tensor:
            return (q[0] == k[0]) & ((q[1] - k[1]).abs() <= self.reach) & (k[2] == k[2])

        def axis_rules(self, grid: Grid) -> Iterable[AxisRule]:
            for axis, length in enumerate(grid.shape):
                place = torch.arange(length)
                reach = (0, self.reach, length)[axis]
                yield AxisRule((place - reach).clamp(min=0), (place + reach).clamp(max=length - 1))

        def cuts(self, grid: Grid) -> tuple[Triple, Triple, Triple]:
            return (1, max(1, self.reach), grid.width), (0, 0, 0), (1, 1, 1)

    @dataclass(frozen=True, eq=False)
    class NearestBounds(BlockSelector):
        """The blocks whose keys can have the largest logits."""

        __qualname__ = "NearestBounds"

        keep: float = 0.25
        block: int = 64
        name: ClassVar[str] = "nearest_bounds"
        color: ClassVar[str] = "#654321"
        example: ClassVar[str] = "nearest_bounds(0.3, 8)"

        @classmethod
        def search_budgets(cls, block: int) -> dict[str, list[HeadPattern]]:
            return {"nearest bounds": [cls(keep, block) for keep in (0.1, 0.3)]}

        def stages(self, layout: TokenLayout) -> Stages:
            return Stages(Bounds(), TopK(self.keep), blocks=(self.block, self.block))

    yield {"near_rows": NearRows, "nearest_bounds": NearestBounds}
    for kind in (NearRows, NearestBounds):
        unregister(kind)
    assert before == KINDS


def test_they_are_registered() -> None:
    assert list(PATTERNS)[-1] == "near_rows" and list(SELECTORS)[-1] == "nearest_bounds"


@pytest.mark.parametrize("layout_name", random.Random(0).sample(list(LAYOUTS), 12))
def test_the_walk_of_forms_takes_it(layout_name: str) -> None:
    layout = LAYOUTS[layout_name]
    pattern = draw("near_rows", layout, 0)
    assert type(pattern) is PATTERNS["near_rows"]
    mask = pattern_mask(pattern, layout)
    assert pattern.density(layout) == pytest.approx(mask.double().mean().item(), abs=1e-14)
    block_map = pattern.lower(layout, 16, 16)
    assert torch.equal(map_mask(block_map), mask) and block_map.pairs() == int(mask.sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "blockwise"])
def test_it_runs(name: str, backend: str) -> None:
    layout = LAYOUTS["video_7x5x3_text_31"]
    q, k, v = torch.randn(3, 1, 2, layout.length, 8, generator=torch.Generator().manual_seed(0))
    out = sparse_attention(q, k, v, parse_pattern(KINDS[name].example), layout, backend=backend)
    assert out.shape == q.shape and bool(out.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_parsed(name: str, kinds: dict[str, type[HeadPattern]]) -> None:
    pattern = parse_pattern(kinds[name].example)
    assert type(pattern) is kinds[name]
    assert parse_pattern(repr(pattern)) == pattern
    plan = Plan((Rule(pattern),))
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=f"did you mean '{name}'"):
        parse_pattern(f"{name}s")


def test_it_is_shown(capsys) -> None:
    text = good(capsys, "show", PATTERNS["near_rows"].example, "--grid", "4x8x8")
    assert "NearRows(reach=2)" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_it_is_shown(name: str, capsys, tmp_path) -> None:
    Plan((Rule(parse_pattern(KINDS[name].example)),)).save_pretrained(tmp_path)
    assert KINDS[name].__name__ in good(capsys, "show", str(tmp_path))


def test_the_gallery_draws_it() -> None:
    path = ROOT / "scripts" / "draw_patterns.py"
    spec = importlib.util.spec_from_file_location("gallery_of_one_file", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert list(script.examples())[-1] == "near_rows"
    rows = -(-len(PATTERNS) // script.COLUMNS)
    with_it = script.gallery()
    unregister(kind := PATTERNS["near_rows"])
    try:
        without = script.gallery()
    finally:
        KINDS["near_rows"] = kind
    assert with_it.height > without.height and rows == -(-17 // script.COLUMNS)


@pytest.mark.parametrize("name", NAMES)
def test_the_palette_colours_it(name: str) -> None:
    color = KINDS[name].color
    assert pattern_colors(["radial", name])[name] == color
    picture = draw_plan(view_plan(Plan((Rule(parse_pattern(KINDS[name].example)),))), title="a")
    assert rgb(color) in {drawn for _, drawn in picture.getcolors(1 << 24)}
    head = {"role": "a", "layer": "b", "number": 0, "head": 0, "phase": 0, "family": name}
    page = render_page(
        {"schema": "visattn.report/1", "kind": "search", "title": "a", "heads": [head]}
    )
    assert f".f0{{background:{color};" in page


def test_the_search_tries_both() -> None:
    layout = TokenLayout(Grid(3, 8, 8))
    choice = CandidateChoice(("near rows", "nearest bounds"))
    rules = choice.dynamic_rules(32)
    assert [(label, repr(pattern)) for label, pattern in rules] == [
        ("nearest bounds", "NearestBounds(keep=0.1, block=32)"),
        ("nearest bounds", "NearestBounds(keep=0.3, block=32)"),
    ]
    pool = choice.pool(layout, 32, (), {}, rules)
    assert [(label, repr(pattern)) for label, pattern in pool.static] == [
        ("near rows", f"NearRows(reach={reach})") for reach in (0, 1, 2)
    ]


def test_all_candidates_include_both() -> None:
    choice = CandidateChoice()
    assert "nearest bounds" in {label for label, _ in choice.dynamic_rules(32)}
    pool = choice.pool(TokenLayout(Grid(3, 8, 8)), 32, (), {}, ())
    assert "near rows" in {label for label, _ in pool.static}
