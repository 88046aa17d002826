"""Published methods against what their authors' code does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from method_docs.sources import read_source

from trial_cases.case import Case
from visattn import Grid, Plan, TokenLayout
from visattn.patterns.base.head_pattern import KINDS
from visattn.selectors import NABLA, PISA, Pyramid, Selector, Sparge, VMoBA, XAttention

LAYOUT = TokenLayout(Grid(4, 8, 8))
PRESETS = Path(__file__).resolve().parents[2] / "assets" / "plans" / "presets"


def levels(selector: Selector) -> torch.Tensor:
    """Which blocks a selector keeps for random queries and keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 16, generator=generator) for _ in range(3))
    return selector.select(q, k, v, LAYOUT, 0.25).levels


def window_of_nabla(folder: Path) -> str:
    tile = (1, 2, 2)
    free = levels(NABLA(1e-6, (3, 3, 3), tile)) > 0
    moved = levels(NABLA(1e-6, (3, 3, 3), tile, clamped=True)) > 0
    corner = int(free[0, 0, 0].sum())
    assert corner in (8, 9), corner  # 2 x 2 x 2 tiles, and the best one
    assert int(moved[0, 0, 0].sum()) in (27, 28)
    return f"the tile in the corner has a window of 8 tiles, and {corner} with the best one"


def own_block(folder: Path) -> str:
    first = levels(PISA(0.15, 16)) == 1
    assert bool((first.sum(-1) == 2).all())  # int(0.15 * 16)
    own = first.diagonal(dim1=-2, dim2=-1)
    assert not bool(own.all())
    kept = levels(PISA(0.15, 16, own=True)) == 1
    assert bool(kept.diagonal(dim1=-2, dim2=-1).all())
    return f"2 of 16 blocks of a row, the own one in {int(own.sum())} of {own.numel()} rows"


def rules(folder: Path) -> str:
    assert bool((levels(XAttention(0.3, 4, 16))[..., 0] == 1).all())
    less = int((levels(Sparge(0.7, -1.0, 16, 16)) > 0).sum())
    more = int((levels(Sparge(0.7, -1.0, 16, 16, crossing=True)) > 0).sum())
    assert more - less == 2 * 16, (more, less)  # one more in each row
    one = levels(VMoBA(share=0.0, box=(2, 4, 4), queries=16)) > 0
    own = levels(VMoBA(share=0.0, box=(2, 4, 4), queries=16, more=False)) > 0
    assert int(one.sum()) - int(own.sum()) == 2 * 16
    capped = levels(Pyramid((0.0, 0.0, 0.0, 1.0), "count", 16, similar=(2.0, 2.0, -2.0)))
    assert int((capped == 8).sum()) == 2 * 16 * 15  # the largest level whose own test holds
    return "XAttention's first column, Sparge's end, VMoBA's further block and Pyramid's cap"


def presets(folder: Path) -> str:
    found = [Plan.from_pretrained(path) for path in sorted(PRESETS.glob("*sparse-videogen"))]
    assert [plan.dense_layers for plan in found] == [(0,)] * 3
    return "one dense layer in the three presets of Sparse VideoGen"


def older_plan(folder: Path) -> str:
    value = {
        "schema": "visattn.plan/1",
        "patterns": ["PISA(keep=0.25, block=64, first_order=True)"],
        "rules": [{"pattern": 0}],
    }
    plan = Plan.from_json(json.dumps(value))
    assert plan.rules[0].patterns == PISA(0.25, own=True)
    return "a plan of schema 1 keeps the own block, as it did when it was written"


def sources(folder: Path) -> str:
    found = [read_source(kind) for kind in KINDS.values()]
    coded = sum(own.default == "code" for own in found)
    assert len(found) >= 41
    return f"{len(found)} patterns name their source; {coded} defaults are those of the code"


CASES = [
    Case("the window of NABLA is moved inward at the borders", window_of_nabla),
    Case("the own block is kept without a word, and counts are rounded up", own_block),
    Case("rules other than those of the authors' code", rules),
    Case("presets with two dense layers where the code has one", presets),
    Case("an older plan means another thing than when it was written", older_plan),
    Case("a pattern without its source", sources),
]
