"""Attention by a selection: the fast form against the oracle, and the identities that must hold."""

from __future__ import annotations

import math

import pytest
import torch
from support.selectors_oracle import LAYOUTS, LONGER, SCALE, SMALL, lengths, small, tensors

from visattn import Grid, TokenLayout, sparse_attention
from visattn.geometry.layout import valid_keys
from visattn.geometry.orders import LineOrder
from visattn.patterns import Diagonal, Neighborhood, Radial, parse_pattern
from visattn.selectors import (
    SELECTORS,
    PooledRest,
    Pyramid,
    SampledRest,
    Selection,
    Selector,
    TopBlocks,
    VMoBA,
    register_gate,
)
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend
from visattn.selectors.per_head_order import uneven_runs
from visattn.selectors.stages.blocks import partition_by_head, partition_by_order
from visattn.selectors.stages.choose import BLOCK


def random_selection(layout: TokenLayout, values: tuple[int, ...], seed: int) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    q_side = partition_by_order(layout, (LineOrder(),), 5, torch.device("cpu"))
    k_side = partition_by_order(layout, (LineOrder("wth"),), 8, torch.device("cpu"))
    shape = (2, 4, len(q_side), len(k_side))
    levels = torch.randint(0, len(values) + 1, shape, generator=generator)
    levels = torch.tensor([0, *values])[levels].to(torch.uint8)
    levels[..., ~k_side.grid] = 1
    levels[:, :, ~q_side.grid] = 1
    levels[0, 1, 0] = 0  # a row that sees nothing
    return Selection(q_side, k_side, levels, tuple(sorted({1, *values})))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("layout", ["video", "odd", "image"])
def test_fast_form_is_the_oracle(layout: str, dtype: torch.dtype) -> None:
    own = LAYOUTS[layout]
    q, k, v = (x.to(dtype) for x in tensors(own))
    text = lengths(own)
    for seed, values in enumerate([(1,), (1, 2, 4, BLOCK), (1, 3), (BLOCK,)]):
        selection = random_selection(own, values, seed)
        out, lse = attend(q, k, v, selection, own, text, SCALE)
        expected, expected_lse = reference_attend(q, k, v, selection, own, text, SCALE)
        atol = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3}[dtype]
        assert out.dtype == dtype and lse.dtype == expected_lse.dtype
        torch.testing.assert_close(out, expected, rtol=0, atol=atol)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=max(atol, 1e-6))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_through_the_operator(name: str) -> None:
    """Both backends, written and read, in float32, with another pattern on one head."""
    selector = small(name)
    assert parse_pattern(repr(selector)) == selector
    assert name in SMALL and type(selector) is SELECTORS[name]
    layout = LAYOUTS["video"]
    q, k, v = (x.float() for x in tensors(layout))
    text = lengths(layout)
    heads = [selector, selector, Diagonal(4), selector]
    for patterns in (selector, heads) if "proxy" not in name else (selector,):
        found = [
            sparse_attention(
                q, k, v, patterns, layout, text_lengths=text, scale=SCALE, backend=backend,
                return_lse=True,
            )
            for backend in ("blockwise", "reference")
        ]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=5e-6)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=5e-6)
    again = sparse_attention(q, k, v, selector, layout, text_lengths=text, scale=SCALE)
    once = sparse_attention(q, k, v, selector, layout, text_lengths=text, scale=SCALE)
    assert torch.equal(again, once)  # deterministic


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    logits = q @ k.mT * SCALE
    text = lengths(layout)
    if text is not None:
        logits = logits.masked_fill(~valid_keys(text, layout)[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


EVERYTHING = [
    TopBlocks(1.0, block=8),
    TopBlocks(1.0, block=8, rest="first_order"),
    TopBlocks(mass=1.0, keep=1.0, block=6, order="hilbert"),
    Pyramid((1.0, 1.0, 1.0, 1.0), block=8),
    VMoBA("3d", box=(2, 2, 2), share=None, keep=1.0, queries=4),
    parse_pattern("cluster_blocks(1.0, 1.0, 5, 7, 3, 8)"),
    parse_pattern("key_order(1.0, 9, 8)"),
    parse_pattern("sparge(0.5, 1.0, 8, 4)"),
    parse_pattern("hashing(128, 9)"),
]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("selector", EVERYTHING, ids=lambda s: s.name)
def test_keeping_everything_is_dense(selector: Selector, layout: TokenLayout) -> None:
    q, k, v = tensors(layout)
    selection = selector.select(q, k, v, layout, SCALE)
    out, lse = attend(q, k, v, selection, layout, lengths(layout), SCALE)
    expected, expected_lse = dense(q, k, v, layout)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-11)
    assert float(selection.block_density().min()) == 1


def test_levels_over_constant_pools_are_exact() -> None:
    """Keys and values that are alike within a pool may be seen by their means."""
    layout = TokenLayout(Grid(2, 8, 4))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 64, 8, generator=generator, dtype=torch.float64)
    side = partition_by_order(layout, (LineOrder(),), 16, torch.device("cpu"))
    for pool in (2, 4, 8, BLOCK):
        size = min(pool, 16)
        k, v = (
            torch.randn(1, 2, 64 // size, 8, generator=generator, dtype=torch.float64)
            .repeat_interleave(size, 2)
            for _ in range(2)
        )
        levels = torch.full((1, 2, 4, 4), pool, dtype=torch.uint8)
        for variance in (False, True):
            selection = Selection(side, side, levels, (pool,), variance=variance)
            out, lse = attend(q, k, v, selection, layout, None, SCALE)
            logits = q @ k.mT * SCALE
            torch.testing.assert_close(out, logits.softmax(-1) @ v, rtol=0, atol=1e-12)
            torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=1e-12)


def test_dropped_mass_explains_the_error() -> None:
    """o - o' = delta (o_dropped - o_kept), and delta is 1 - exp(LSE_kept - LSE)."""
    layout = LAYOUTS["line"]
    q, k, v = tensors(layout)
    selection = TopBlocks(0.5, block=3).select(q, k, v, layout, SCALE)
    kept, kept_lse = attend(q, k, v, selection, layout, None, SCALE)
    levels = (selection.levels == 0).to(torch.uint8)
    other = Selection(selection.q_side, selection.k_side, levels)
    dropped, dropped_lse = attend(q, k, v, other, layout, None, SCALE)
    whole, lse = dense(q, k, v, layout)
    delta = 1 - (kept_lse - lse).exp()
    torch.testing.assert_close(delta, (dropped_lse - lse).exp(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        whole - kept, delta[..., None] * (dropped - kept), rtol=0, atol=1e-12
    )


def test_a_mean_under_estimates_the_mass_of_its_block() -> None:
    """ln sum e^(q.k) >= ln n + q.mean(k), Jensen; the variance term closes most of the gap of a
    narrow block."""
    layout = LAYOUTS["line"]
    q, k, v = tensors(layout)
    side = partition_by_order(layout, (LineOrder(),), 15, torch.device("cpu"))
    levels = torch.full((2, 4, 1, 1), BLOCK, dtype=torch.uint8)
    narrow = k.mean(2, keepdim=True) + 0.2 * (k - k.mean(2, keepdim=True))
    found = [
        attend(q, narrow, v, Selection(side, side, levels, (BLOCK,), variance=x), layout, None,
               SCALE)[1]
        for x in (False, True)
    ]
    _, lse = dense(q, narrow, v, layout)
    assert bool((found[0] <= lse + 1e-12).all())
    assert float((found[1] - lse).abs().mean()) < 0.4 * float((found[0] - lse).abs().mean())


def smooth_field(seed: int) -> tuple[TokenLayout, tuple[torch.Tensor, ...]]:
    """Queries, keys and values that vary slowly over the grid, as those of videos do."""
    layout = TokenLayout(Grid(4, 16, 16))
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, 32, 2, 3, 3, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (4, 16, 16), mode="trilinear")
    noise = 0.1 * torch.randn(3, 32, 4, 16, 16, generator=generator)
    q, k, v = (fine + noise).flatten(2).mT[:, None, None].double()
    return layout, (1.5 * q, 1.5 * k, v)


def error_of(rest: PooledRest | None, sized: bool = True) -> float:
    """Relative error of the output with a quarter of the blocks kept."""
    total = 0.0
    for seed in range(3):
        layout, (q, k, v) = smooth_field(seed)
        selection = TopBlocks(0.25, block=64).select(q, k, v, layout, 32**-0.5)
        own = Selection.of(selection.q_side, selection.k_side, selection.levels, (1,), rest)
        if sized:
            out, _ = attend(q, k, v, own, layout, None, 32**-0.5)
        else:  # a mean that weighs as one token
            kept, kept_lse = attend(q, k, v, selection, layout, None, 32**-0.5)
            levels = own.levels.masked_fill(own.levels == 1, 0)
            other = Selection(own.q_side, own.k_side, levels, (BLOCK,))
            mean, mean_lse = attend(q, k, v, other, layout, None, 32**-0.5)
            mean_lse = mean_lse - math.log(64)
            both = torch.logaddexp(kept_lse, mean_lse)[..., None]
            out = kept * (kept_lse[..., None] - both).exp() + mean * (
                mean_lse[..., None] - both
            ).exp()
        logits = q @ k.mT * 32**-0.5
        expected = logits.softmax(-1) @ v
        total += float((out - expected).norm() / expected.norm())
    return total / 3


def test_the_number_of_tokens_is_needed_and_the_variance_helps() -> None:
    drop, alone = error_of(None), error_of(PooledRest(), sized=False)
    sized, spread = error_of(PooledRest()), error_of(PooledRest(variance=True))
    assert sized < 0.6 * drop and sized < 0.6 * alone
    assert spread < sized


def test_a_sample_stands_for_the_rest() -> None:
    """With all keys drawn it is dense; with few, right on the average."""
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    base = TopBlocks(0.3, block=8).select(q, k, v, layout, SCALE)
    whole, whole_lse = dense(q, k, v, TokenLayout(Grid(1, 1, layout.length)))

    def run(rest: SampledRest) -> tuple[torch.Tensor, torch.Tensor]:
        own = Selection.of(base.q_side, base.k_side, base.levels, (1,), rest)
        return attend(q, k, v, own, layout, None, SCALE)

    out, lse = run(SampledRest(10_000))
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-11)
    masses = torch.stack([run(SampledRest(20, seed))[1].exp() for seed in range(60)]).mean(0)
    ratio = (masses / whole_lse.exp()).mean()
    assert 0.9 < float(ratio) < 1.1


@pytest.mark.parametrize("seed", range(4))
def test_uneven_runs_cover_the_groups(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 12, (2, 3, 6), generator=generator)
    counts[0, 0] = 0
    counts[..., -1] = 60 - counts[..., :-1].sum(-1)
    runs = uneven_runs(counts, 60, 7)
    for b in range(2):
        for h in range(3):
            seen = []
            rows = zip(*(x[b, h].tolist() for x in runs), strict=True)
            for start, length, group in rows:
                assert length <= 7
                begin = int(counts[b, h, :group].sum())
                end = begin + int(counts[b, h, group])
                assert length == 0 or (begin <= start and start + length <= end)
                seen += range(start, start + length)
            assert seen == list(range(60))


def test_arranged_blocks_keep_every_token_once() -> None:
    layout = LONGER
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2, 3, 90, generator=generator).argsort(-1)
    counts = torch.tensor([[40, 0, 50]] * 6).view(2, 3, 3)
    runs = uneven_runs(counts, 90, 16)
    side = partition_by_head(layout, order, runs.start, runs.length, 16)
    for b in range(2):
        for h in range(3):
            tokens = side.tokens[b, h][side.exists[b, h]].tolist()
            assert sorted(tokens) == list(range(layout.length))


# ---- gradients, compiled calls, refusals


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["top_blocks", "pyramid", "pisa", "rectified", "hashing"])
def test_gradients_flow_through_what_is_seen(name: str) -> None:
    layout = LAYOUTS["line"]
    q, k, v = (x[:1, :2, :, :4].clone().requires_grad_() for x in tensors(layout))
    selector = small(name)
    with torch.no_grad():
        selection = selector.select(q, k, v, layout, SCALE)
    if selection.correction is not None:
        selection = Selection(selection.q_side, selection.k_side, selection.levels)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return attend(*x, selection, layout, None, SCALE)[0]

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize("rest", [None, SampledRest(3)], ids=str)
def test_rows_that_see_nothing_of_a_set_have_finite_gradients(rest: SampledRest | None) -> None:
    """Rows without a key, and rows that see every block that a sampled key is of."""
    layout = LAYOUTS["video"]
    chosen = random_selection(layout, (1,), 0)
    levels = chosen.levels.clone()
    levels[:, :, 2] = 1
    selection = Selection.of(chosen.q_side, chosen.k_side, levels, (1,), rest)
    own = [x.clone().requires_grad_() for x in tensors(layout)]
    out, lse = attend(*own, selection, layout, None, SCALE)
    finite = lse != -torch.inf
    assert bool(finite.all()) == (rest is not None)
    loss = out.square().sum() + lse.masked_fill(~finite, 0).square().sum()
    found = torch.autograd.grad(loss, own)
    assert all(bool(x.isfinite().all()) for x in found)
    moved = [x.detach().clone() for x in own]
    step, places = 1e-6, [(0, 0, 3, 1), (1, 1, 20, 0), (0, 1, 60, 5)]
    for x, grad, place in zip(moved, found, places, strict=True):  # against differences
        values = []
        for sign in (1, -1):
            x[place] += sign * step
            out, lse = attend(*moved, selection, layout, None, SCALE)
            finite = lse.masked_fill(lse == -torch.inf, 0)
            values.append(float(out.square().sum() + finite.square().sum()))
            x[place] -= sign * step
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(grad[place]), abs=1e-5)


def test_compiled_call_is_the_same() -> None:
    layout = LAYOUTS["video"]
    q, k, v = (x.float() for x in tensors(layout))
    heads = [small("top_blocks"), Radial(), small("pyramid"), Neighborhood((0.5, 0.5, 0.5))]
    layout_ = layout

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, heads, layout_)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), run(q, k, v))


def test_what_cannot_be_is_refused() -> None:
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    several = TokenLayout(segments=[Grid(1, 5, 5), Grid(2, 6, 6)])
    x = torch.randn(1, 2, several.length, 8)
    with pytest.raises(ValueError, match="needs a layout with one grid"):
        sparse_attention(x, x, x, small("key_order"), several)
    with pytest.raises(ValueError, match="kv_layout"):
        sparse_attention(x, x[:, :, :25], x[:, :, :25], small("vsa"), several,
                         kv_layout=TokenLayout(Grid(1, 5, 5)))
    far = (
        "nabla(0.9, (9, 3, 2), (1, 2, 3), clamped=True)",
        "online_choice((neighborhood((9, 3, 3)), stripe()))",
    )
    for text in far:
        with pytest.raises(ValueError, match="window="):
            parse_pattern(text).check(Grid(3, 5, 6))
    with pytest.raises(ValueError, match="groups=3 must divide the 4 heads"):
        sparse_attention(q, k, v, parse_pattern("proxy_heads(0.6, 3, 3, 8)"), layout)
    with pytest.raises(ValueError, match="has no LSE"):
        sparse_attention(q, k, v, parse_pattern("agent((1, 2, 2))"), layout, return_lse=True)
    for text in ("top_blocks(0)", "top_blocks(keep=1.5)", "top_blocks(score='best')",
                 "vmoba('4d')", "vmoba(share=None, scope='block')", "pyramid((0.5, 0.4, 0.6, 0.8))",
                 "draft(0.0)", "hashing(projections=20)", "online_choice((diagonal(3),))"):
        with pytest.raises((TypeError, ValueError), match=r"must|needs|goes with"):
            parse_pattern(text)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["top_blocks", "vmoba", "pyramid", "rectified", "jenga", "key_order", "cluster_blocks"]
)
def test_scores_that_are_not_finite_keep_everything_in_their_heads(name: str, wrong: float) -> None:
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    plain = small(name).select(q, k, v, layout, SCALE)
    k[1, 0, 40, 3] = wrong
    selection = small(name).select(q, k, v, layout, SCALE)
    broken = torch.zeros(q.shape[:2], dtype=torch.bool)
    broken[1, : q.shape[1] // k.shape[1]] = True
    assert not plain.broken.any() and torch.equal(selection.broken[..., 0, 0], broken)
    assert float(selection.block_density()[broken].min()) == 1
    assert torch.equal(selection.levels[~broken], plain.levels[~broken])
    out, _ = attend(q, k, v, selection, layout, lengths(layout), SCALE)
    expected, _ = attend(q, k, v, plain, layout, lengths(layout), SCALE)
    torch.testing.assert_close(out[~broken], expected[~broken], rtol=0, atol=1e-9)


def test_a_trained_gate_chooses() -> None:
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    gated = parse_pattern("top_blocks(0.3, score='gate:mine', block=8)")
    assert isinstance(gated, TopBlocks)
    with pytest.raises(ValueError, match="gate 'mine' is not registered"):
        gated.select(q, k, v, layout, SCALE)
    register_gate("mine", lambda inputs: inputs.q_mean @ inputs.k_mean.mT * SCALE)
    found = gated.select(q, k, v, layout, SCALE)
    own = parse_pattern("moba(0.3, 8, 8, 'tiles')")
    assert isinstance(own, Selector)
    expected = own.select(q, k, v, layout, SCALE)
    assert torch.equal(found.levels, expected.levels)
    register_gate("mine", lambda inputs: inputs.q_mean)
    with pytest.raises(ValueError, match="they must be"):
        gated.select(q, k, v, layout, SCALE)
    with pytest.raises(ValueError, match="name="):
        register_gate("a b", lambda inputs: inputs.q_mean)


def test_several_grids_are_chosen_among_together() -> None:
    several = TokenLayout(segments=[Grid(1, 5, 5), Grid(2, 6, 6)])
    q = torch.randn(1, 2, several.length, 8, dtype=torch.float64)
    whole = sparse_attention(q, q, q, TopBlocks(1.0, block=8), several, backend="blockwise")
    torch.testing.assert_close(
        whole, (q @ q.mT * 8**-0.5).softmax(-1) @ q, rtol=0, atol=1e-12
    )
