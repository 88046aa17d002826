"""Heads of known structure get their pattern."""

import pytest
import torch
from support import planted

from visattn import sparse_attention
from visattn.inject import Observation
from visattn.patterns import Dense, Skip, Stencil
from visattn.search.candidates.learned_stencils import learned, stencils_of
from visattn.search.measure.output_losses import CandidatePool, CandidateScorer
from visattn.search.measure.tile_grid import TileGrid, stencil_of, tile_grids
from visattn.search.solve.assignments import LayerFronts
from visattn.selectors import VSA, TopBlocks
from visattn.tasks.result_store import StoredResult

pytestmark = pytest.mark.second

GROUP = (0, "transformer", 0)


@pytest.fixture(scope="module")
def table():
    return planted.table(dynamic=[("tiles", VSA(0.25, (1, 4, 4)))])


@pytest.fixture(scope="module")
def chosen(table):
    """Of every head the cheapest option that leaves out less than a hundredth of what Skip does."""
    out = {}
    for head, name in enumerate(planted.NAMES):
        skip = float(table.losses[GROUP][head, -1, 0])
        options = table.options(GROUP, head)
        own = next(option for option in options if option.loss < 0.01 * skip)
        (out[name],) = table.patterns(GROUP, (-1,) * head + own.choice)[head:]
    return out


def kept(pattern):
    """Which pairs a pattern keeps, bool ``[L, L]``."""
    line = torch.arange(planted.GRID.numel)
    return pattern.allows(line[:, None], line, planted.LAYOUT)


@pytest.mark.parametrize("name", ["diagonal", "temporal", "column", "local", "several"])
def test_each_structure_gets_a_pattern_that_holds_it(chosen, name):
    """All of its mass, within a small part of the pairs."""
    weights = planted.structures(0)[name]
    assert float((weights * ~kept(chosen[name])).sum() / weights.sum()) < 0.02
    assert kept(chosen[name]).float().mean() < 0.3


def test_the_one_that_needs_it_stays_dense(chosen):
    assert chosen["diffuse"] == Dense()


def test_a_head_that_moves_gets_a_dynamic_rule(chosen):
    assert isinstance(chosen["moving"], VSA), chosen["moving"]


def test_a_budget_goes_where_it_is_needed(table, chosen):
    """With what the choices above cost in all, the knapsack has no more loss than they have."""
    heads = tuple(chosen.values())
    budget = sum(table.times.head(pattern) for pattern in heads)

    def loss(patterns):
        total = 0.0
        for head, pattern in enumerate(patterns):
            own = [p for _, p in table.candidates(GROUP, head)]
            if pattern in own:
                total += float(table.losses[GROUP][head, own.index(pattern), 0])
        return total

    found = LayerFronts(table).across(1.01 * budget)[GROUP]
    assert sum(table.times.head(pattern) for pattern in found) <= 1.01 * budget
    assert loss(found) <= 1.05 * loss(heads)
    assert found[planted.NAMES.index("diffuse")] == Dense()


def test_names_of_families(table, chosen):
    """The simple structures get the families that are made of them, or a stencil."""
    families = {
        name: next(f for f, p in table.candidates(GROUP, head) if p == chosen[name])
        for head, name in enumerate(planted.NAMES)
        if chosen[name] != Dense()
    }
    assert families["diagonal"] in ("band", "neighborhood in the frame", "stencil")
    assert families["temporal"] in (
        "band hwt", "band wht", "neighborhood along time", "windows along time",
        "bands across frames", "stencil",
    )  # fmt: skip
    assert families["local"] in (
        "neighborhood", "neighborhood along time", "sliding tile", "halo", "stencil"
    )  # fmt: skip
    assert families["several"] == families["column"] == "stencil"


def test_a_stencil_has_the_exact_offsets():
    """Of a head whose tiles of 1x4x4 look at three others."""
    learner = planted.learn(range(2))
    tables = learned([StoredResult(*learner.item())], lambda step: 0)[GROUP[0], "transformer", 0]
    at = [grid.tile for grid in learner.grids].index((1, 4, 4))
    grid, row = learner.grids[at], tables[at][planted.NAMES.index("several")]
    offsets = len(grid.pairs)
    wanted = {(0, 0, 0), (2, 0, 0), (-1, 0, 1)}
    pairs = sum(int(grid.pairs[n]) for n in range(offsets) if grid.triple(n) in wanted)
    found = stencil_of(grid, row[:offsets], row[offsets:], pairs / grid.count.numel**2)
    assert set(found.offsets) == wanted
    assert found.columns == ()


def test_columns_are_learned():
    learner = planted.learn(range(2))
    tables = learned([StoredResult(*learner.item())], lambda step: 0)[GROUP[0], "transformer", 0]
    own = stencils_of(tables, learner.grids, (0.15,))[planted.NAMES.index("column")]
    assert all(stencil.columns for stencil in own)


def test_a_call_that_is_not_finite_is_left_out_and_said():
    learner = planted.learn([0], broken=True)
    assert learner.places == []
    assert learner.failures == ["blocks.0 at step 0 is not finite"]
    grids = tile_grids(planted.LAYOUT, planted.BLOCK)
    scorer = CandidateScorer(
        CandidatePool((), (), {}), planted.weights_of().__getitem__, {0}, grids, 4, 4
    )
    scorer(planted.observation(0))
    scorer(planted.observation(0, broken=True))
    assert len(scorer.places) == 1
    assert list(scorer.failures) == ["blocks.0, step 0, cond"]


def test_a_candidate_that_runs_out_of_memory_is_left_out_and_said(monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr("visattn.search.measure.output_losses.sparse_attention", out_of_memory)
    pool = CandidatePool((), (("top", TopBlocks(0.25)),), {})
    grids = tile_grids(planted.LAYOUT, planted.BLOCK)
    scorer = CandidateScorer(pool, planted.weights_of().__getitem__, {0}, grids, 4, 4)
    for prompt in range(2):
        scorer(planted.observation(prompt))
    assert torch.isnan(scorer.errors[0][:, 0]).all()
    assert list(scorer.failures.values()) == ["tried to allocate 1 TiB"]


@pytest.mark.parametrize("text", [0, 5])
def test_losses_are_those_of_the_operator(text):
    """Of random heads with all rows read: every candidate's projected and output error is what
    ``sparse_attention`` gives, and the rest is Skip's."""
    from visattn.geometry.layout import Grid, TokenLayout
    from visattn.patterns import Diagonal, Neighborhood

    layout = TokenLayout(Grid(3, 4, 4), text_after=text)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.length, 8, generator=generator) for _ in range(3))
    weights = torch.randn(5, 16, generator=generator)
    grids = [TileGrid((1, 2, 2), layout), TileGrid((3, 2, 1), layout)]
    own = [
        [
            Stencil((1, 2, 2), ((0, 0, 0), (1, 0, -1)), (2,)),
            Stencil((3, 2, 1), ((0, 0, 0), (0, 1, 1))),
        ],
        [Stencil((1, 2, 2), ((0, 0, 0),)), Stencil((3, 2, 1), ((0, 0, 0), (0, 0, 2)))],
    ]
    static = (("band", Diagonal(5)), ("neighborhood", Neighborhood((3, 1, 3))))
    dynamic = (("top", TopBlocks(0.5, block=8, rest="pooled")),)
    layer = "transformer", 0
    pool = CandidatePool(static, dynamic, {layer: own})
    scorer = CandidateScorer(pool, {layer: weights}.__getitem__, {0}, grids, 4, 4, exact=True)
    scorer(Observation("transformer", "b", 0, 0, 1, ("cond",), q, k, v, layout, None))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, :, : 3 * 4 * 4]
    projections = weights.unflatten(1, (2, 8))
    whole = torch.einsum("bhld,ohd->blo", exact, projections).square().sum()
    for head in range(2):
        options = pool.options(layer, head)
        assert options[-1] == ("skip", Skip())
        for n, (_, pattern) in enumerate(options):
            out = sparse_attention(q, k, v, pattern, layout)[:, :, : exact.shape[2]]
            apart = (exact - out)[0, head]
            projected = (apart @ projections[:, head].mT).square().sum() / whole
            found = scorer.errors[0][head, n]
            torch.testing.assert_close(found[0], projected.double(), rtol=1e-3, atol=1e-6)
            ratio = apart.square().sum() / exact[0, head].square().sum()
            torch.testing.assert_close(found[1], ratio.double(), rtol=1e-3, atol=1e-6)


def test_sampled_and_exact_scores_rank_alike(table):
    """Rank correlation of the candidates' losses, within each head."""
    learner = planted.learn([0])
    sampled, exact = (
        CandidateScorer(
            table.pool, planted.weights_of().__getitem__, {0}, learner.grids, 12, 8, exact=flag
        )
        for flag in (False, True)
    )
    call = planted.observation(9)
    sampled(call)
    exact(call)
    for head in range(len(planted.NAMES)):
        a, b = (own.errors[0][head, :, 0].argsort().argsort().double() for own in (sampled, exact))
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert correlation > 0.9, planted.NAMES[head]
