"""One walk over all patterns and odd layouts: every form of a pattern is the same pattern."""

from __future__ import annotations

import random

import pytest
import torch
from support.cases import LAYOUTS, draw, draw_text_lengths

from visattn import Grid, Segment, TokenLayout, sparse_attention
from visattn.attention.backends.reference import map_mask, pattern_mask
from visattn.blocks.block_map import FULL, PARTIAL, SHORT, TEXT
from visattn.patterns import PATTERNS, Dense, Diagonal, Neighborhood, Skip, Stripe

BLOCKS = [(4, 4), (16, 16), (7, 11), (32, 16), (16, 64), (64, 64), (128, 128)]


def test_enough_odd_layouts() -> None:
    assert len(LAYOUTS) >= 40


@pytest.mark.sampled(5)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.second)])
@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("name", PATTERNS)
def test_all_forms_agree(name: str, layout_name: str, seed: int) -> None:
    """With one draw of the parameters in each tier."""
    layout = LAYOUTS[layout_name]
    generator = torch.Generator().manual_seed(seed)
    pattern = draw(name, layout, seed)
    mask = pattern_mask(pattern, layout)
    assert pattern.density(layout) == pytest.approx(mask.double().mean().item(), abs=1e-14)
    assert bool(mask.any(1).all()) or name == "skip"

    block_q, block_k = random.Random(f"{name}{layout_name}{seed}").choice(BLOCKS)
    block_map = pattern.lower(layout, block_q, block_k)
    assert torch.equal(map_mask(block_map), mask), pattern
    assert block_map.pairs() == int(mask.sum())
    status, length = block_map.status(), block_map.k_blocks.length
    text = torch.tensor([s.kind == "text" for s in layout.segments])[block_map.k_blocks.segment]
    columns = {kind: (status == kind).nonzero()[:, 1] for kind in (FULL, TEXT, SHORT)}
    assert bool((length[columns[FULL]] == block_k).all()) and not bool(text[columns[FULL]].any())
    assert bool((length[columns[TEXT]] == block_k).all()) and bool(text[columns[TEXT]].all())
    assert bool((length[columns[SHORT]] < block_k).all())

    promoted = pattern.lower(layout, block_q, block_k, partial="promote")
    assert bool((map_mask(promoted) >= mask).all()) and promoted.num_partial == 0
    assert promoted.num_visited == block_map.num_visited
    whole_rows = (status != PARTIAL) & (status > 0)
    if name == "skip" or bool(whole_rows.any(1).all()):
        dropped = pattern.lower(layout, block_q, block_k, partial="drop")
        assert bool((map_mask(dropped) <= mask).all()) and dropped.num_partial == 0
    else:
        with pytest.raises(ValueError, match=r"leaves .* query blocks without any key"):
            pattern.lower(layout, block_q, block_k, partial="drop")

    q, k, v = (
        torch.randn(3, 2, layout.length, 8, dtype=torch.float64, generator=generator)
        for _ in range(3)
    )
    for lengths in dict.fromkeys([None, draw_text_lengths(layout, 3, generator)]):
        expected, expected_lse = sparse_attention(
            q, k, v, pattern, layout, text_lengths=lengths, backend="reference", return_lse=True
        )
        out, lse = sparse_attention(
            q, k, v, pattern, layout, text_lengths=lengths, backend="blockwise", return_lse=True
        )
        fused = sparse_attention(
            q, k, v, pattern, layout, text_lengths=lengths, backend="blockwise"
        )
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
        torch.testing.assert_close(fused, expected, rtol=0, atol=1e-12)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "layout_name",
    [
        pytest.param(name, marks=pytest.mark.second) if number % 2 else name
        for number, name in enumerate(LAYOUTS)
    ],
)
def test_heads_with_different_patterns_and_grouped_queries(layout_name: str) -> None:
    layout = LAYOUTS[layout_name]
    generator = torch.Generator().manual_seed(1)
    patterns = [draw(name, layout, 7) for name in PATTERNS]
    q = torch.randn(2, len(patterns), layout.length, 8, dtype=torch.float64, generator=generator)
    k, v = (
        torch.randn(2, 4, layout.length, 8, dtype=torch.float64, generator=generator)
        for _ in range(2)
    )
    lengths = draw_text_lengths(layout, 2, generator)
    outs = [
        sparse_attention(
            q, k, v, patterns, layout, text_lengths=lengths, backend=backend, return_lse=True
        )
        for backend in ("reference", "blockwise")
    ]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
    for head, pattern in enumerate(patterns):  # a head's result is that of its pattern alone
        group = slice(head // 4, head // 4 + 1)
        own = sparse_attention(
            q[:, head : head + 1],
            k[:, group],
            v[:, group],
            pattern,
            layout,
            text_lengths=lengths,
            backend="reference",
        )
        torch.testing.assert_close(outs[1][0][:, head : head + 1], own, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "pattern", [Dense(), Skip(), Diagonal(9), Stripe(), Neighborhood((2, 3, 3))], ids=str
)
def test_separate_key_layout(pattern: object) -> None:
    """Keys with other text, and a further grid that has no partner and is kept whole."""
    grid = Grid(3, 4, 5)
    layout = TokenLayout(grid, text_before=3)
    keys = TokenLayout(segments=[grid, Segment("text", 7), Grid(1, 4, 4)])
    assert isinstance(pattern, (Dense, Skip, Diagonal, Stripe, Neighborhood))
    mask = pattern_mask(pattern, layout, keys)
    own = pattern_mask(pattern, TokenLayout(grid))
    assert torch.equal(mask[3:, :60], own)
    assert bool((mask[:, 60:] == (not isinstance(pattern, Skip))).all())
    assert torch.equal(map_mask(pattern.lower(layout, 16, 16, kv_layout=keys)), mask)
    assert pattern.density(layout, keys) == pytest.approx(mask.double().mean().item(), abs=1e-14)
    q = torch.randn(2, 2, layout.length, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, keys.length, 8, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([7, 2])
    outs = [
        sparse_attention(
            q, k, v, pattern, layout, kv_layout=keys, text_lengths=lengths, backend=backend
        )
        for backend in ("reference", "blockwise")
    ]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("order", ["hilbert", "wth", "box", "explicit"])
def test_any_order_gives_the_same_pattern(name: str, order: str) -> None:
    """A pattern lowered in a foreign order visits more blocks and keeps the same pairs."""
    from visattn.geometry.orders import BoxOrder, ExplicitOrder, HilbertOrder, LineOrder

    layout = TokenLayout(Grid(5, 6, 7), text_after=5)
    shuffled = torch.randperm(210, generator=torch.Generator().manual_seed(3)).tolist()
    orders = {
        "hilbert": HilbertOrder(),
        "wth": LineOrder("wth"),
        "box": BoxOrder((2, 2, 4), dilation=(1, 2, 1)),
        "explicit": ExplicitOrder(tuple(shuffled)),
    }
    for seed in range(3):
        pattern = draw(name, layout, seed)
        block_map = pattern.lower(layout, 16, 16, order=orders[order])
        assert torch.equal(map_mask(block_map), pattern_mask(pattern, layout)), pattern
