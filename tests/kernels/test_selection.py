"""The kernels of dynamic patterns against plain torch, interpreted where there is no GPU.

The select stage is bit-equal; outputs are within the bound of float32 of the float64 form.
"""

from __future__ import annotations

import pytest
import torch
from support.selectors_oracle import LAYOUTS, SCALE, SMALL, lengths, small, tensors

from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.dispatch import execute
from visattn.attention.spec import AttentionSpec, Choice
from visattn.geometry.orders import LineOrder
from visattn.kernels.levels import Keys
from visattn.kernels.queries import queries_forward
from visattn.kernels.summary import summarise
from visattn.selectors import (
    Memory,
    MoBA,
    PooledRest,
    Pyramid,
    Reuse,
    SampledRest,
    Selection,
    Selector,
    SkipList,
    TopBlocks,
)
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend
from visattn.selectors.attend.dynamic_triton import kernel_attend
from visattn.selectors.methods.across_steps.skip_list import packed, unpacked
from visattn.selectors.stages.blocks import block_means, partition_by_order
from visattn.selectors.stages.choose import (
    ChoiceRule,
    Levels,
    Threshold,
    TokenBudget,
    TopK,
    TopP,
)
from visattn.selectors.stages.inputs import Inputs
from visattn.selectors.stages.kernels import kernel_levels, summary
from visattn.selectors.stages.scores import Pooled

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TILE = (16, 16, 4, 1)

SELECTS: list[ChoiceRule] = [
    TopK(0.25),
    TopK(4),
    TopK(0.2, inside=False),
    TopK(0.3, scope="head"),
    TopK(3, scope="head"),
    TopP(0.9),
    TopP(0.5, least=0.2, most=6),
    TopP(0.7, counted=True),
    TopP(0.6, scope="head"),
    TopP(0.7, counted=True, scope="head", least=2),
    Threshold(0.05),
    Threshold(),
    TokenBudget(0.3),
    Levels(),
    Levels((0.1, 0.2, 0.3, 0.6), by="count"),
    Levels((0.0, 0.5), (1, 8), least=None),
    Levels((0.4,), (2,), by="count", least=3),
]


def scores(seed: int) -> torch.Tensor:
    """Ties, zeros of both signs, rows and columns with nothing to choose."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-6, 6, (2, 3, 7, 21), generator=generator).float()
    x[0, 1] = torch.randn(7, 21, generator=generator) * 3
    x[:, :, 2] = -torch.inf
    x[1, 2, 4, 5:] = -torch.inf
    x[:, :, :, 3] = -torch.inf
    x[0, 0, 0, :9] = torch.tensor([0.0, -0.0, 0.0] * 3)
    return x.to(DEVICE)


@pytest.mark.second
@pytest.mark.parametrize("select", SELECTS, ids=str)
def test_select_stage_is_bit_equal(select: ChoiceRule) -> None:
    generator = torch.Generator().manual_seed(1)
    for seed, shape in enumerate(((1, 1), (2, 3))):  # shared by all heads, and of each
        forced = (torch.rand(*shape, 7, 21, generator=generator) < 0.1).to(DEVICE)
        forced[:, :, 2] = True
        length = torch.randint(1, 65, (*shape, 21), generator=generator).to(DEVICE)
        found = kernel_levels(select, scores(seed), length, forced)
        assert found is not None
        assert torch.equal(found, select(scores(seed), length, forced))


def test_summaries_are_means_of_blocks() -> None:
    layout = LAYOUTS["video"]
    q, k, _ = (x.float().to(DEVICE) for x in tensors(layout))
    side = partition_by_order(layout, (LineOrder("wth"),), 8, DEVICE)
    for x in (q, k.mT.contiguous().mT[:, :, :, :8]):
        expected = block_means(side.take(x), side.exists)
        assert torch.allclose(summary(x, side, x.shape[1]), expected, rtol=0, atol=1e-6)


def outputs_agree(
    selector: Selector | None,
    layout: TokenLayout,
    selection: Selection | None = None,
    tile: tuple[int, int, int, int] = TILE,
) -> None:
    q, k, v = (x.float() for x in tensors(layout))
    texts = lengths(layout)
    if selection is None:
        assert selector is not None
        selection = selector.select(q, k, v, layout, SCALE)
        on_device = selector.select(*(x.to(DEVICE) for x in (q, k, v)), layout, SCALE)
    else:
        on_device = selection
    exact, exact_lse = attend(q.double(), k.double(), v.double(), selection, layout, texts, SCALE)
    eager, eager_lse = attend(q, k, v, selection, layout, texts, SCALE)
    found, lse, _ = kernel_attend(
        *(x.to(DEVICE) for x in (q, k, v)),
        on_device,
        layout,
        None if texts is None else texts.to(DEVICE),
        SCALE,
        settings=tile,
    )
    # eager sums in other groups: its own error is a measure, not more
    for own, other, true in ((found, eager, exact), (lse, eager_lse, exact_lse)):
        gone = true == -torch.inf
        assert torch.equal(own.cpu() == -torch.inf, gone)
        apart = (own.cpu().double() - true).masked_fill(gone, 0).abs().max()
        bound = (other.double() - true).masked_fill(gone, 0).abs().max()
        assert apart <= 2 * bound + 4e-7 * true.masked_fill(gone, 0).abs().max()


@pytest.mark.second
@pytest.mark.parametrize("name", [name for name in SMALL if name != "reuse"])
def test_every_selector_through_the_kernels(name: str) -> None:
    outputs_agree(small(name), LAYOUTS["odd"])


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "selector",
    [
        Pyramid(block=32, pooled=True),  # tiles, and units of three levels beside
        Pyramid(block=24, ends=(0.2, 0.4, 0.6, 0.8), by="count"),
        TopBlocks(0.3, block=32, rest="variance"),
        MoBA(0.3, block=24),
        MoBA(0.3, block=16, queries=8),
    ],
    ids=str,
)
def test_tiles_units_and_single_queries(selector: Selector) -> None:
    outputs_agree(selector, LAYOUTS["video"])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rest", [None, PooledRest(True), PooledRest(False, True), SampledRest(5)])
def test_random_levels(rest: PooledRest | SampledRest | None) -> None:
    """Rows that see nothing, every level, queries of which several share a row."""
    layout = LAYOUTS["video"]
    generator = torch.Generator().manual_seed(3)
    q_side = partition_by_order(layout, (LineOrder(),), 5, torch.device("cpu"))
    k_side = partition_by_order(layout, (LineOrder("wth"),), 8, torch.device("cpu"))
    values = (1, 2, 3, 8)
    levels = torch.randint(0, 5, (2, 4, len(q_side), len(k_side)), generator=generator)
    levels = torch.tensor([0, *values])[levels].to(torch.uint8)
    levels[..., ~k_side.grid] = 1
    levels[:, :, ~q_side.grid] = 1
    selection = Selection.of(q_side, k_side, levels, values, rest, variance=rest is not None)
    if rest is None:
        selection.levels[0, 1, 0] = 0
    if GPU:
        pytest.skip("sides are on the CPU")
    outputs_agree(None, layout, selection)


def test_integers_end_to_end_are_identical() -> None:
    """Of small integers and blocks of powers of two, sums are exact: the same blocks, ties too."""
    layout = TokenLayout(Grid(2, 4, 8), text_after=4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randint(-2, 3, (1, 2, layout.length, 16), generator=generator).float().to(DEVICE)
        for _ in range(3)
    )
    for selector in (
        TopBlocks(0.4, block=8, order="raster"),
        MoBA(0.3, block=16),
        TopBlocks(0.4, mass=0.5, block=8, order="raster"),
    ):
        own = selector.select(q, k, v, layout, 0.25, kernels=True).levels
        assert torch.equal(own, selector.select(q, k, v, layout, 0.25).levels)
        assert 0 < own.float().mean() < 1
        out = sparse_attention(q, k, v, pattern=selector, layout=layout, backend="triton")
        other = sparse_attention(q, k, v, pattern=selector, layout=layout, backend="blockwise")
        assert torch.allclose(out, other, atol=2e-6)


def test_pooled_scores_are_within_four_ulp() -> None:
    layout = LAYOUTS["image"]
    q, k, v = (x.float().to(DEVICE) for x in tensors(layout))
    sides = [partition_by_order(layout, (LineOrder(),), size, DEVICE) for size in (5, 8)]
    pairs = Inputs(q, k, v, layout, SCALE, sides[0], sides[1]).pairs
    for scaled in (False, True):
        score = Pooled(scaled=scaled)
        plain = score(Inputs(q, k, v, layout, SCALE, sides[0], sides[1]))
        own = score(Inputs(q, k, v, layout, SCALE, sides[0], sides[1], kernels=True))
        assert torch.equal(own == -torch.inf, ~pairs.expand_as(own))
        apart = (own - plain).masked_fill(~pairs, 0).abs()
        assert float(apart.max()) <= 4 * torch.finfo(torch.float32).eps * float(plain.abs().max())


def test_largest_logits_are_recorded() -> None:
    layout = TokenLayout(Grid(2, 4, 8), text_after=3)
    q, k, v = (x.float() for x in tensors(layout))
    selector = TopBlocks(0.5, block=16, order="raster")
    selection = selector.select(q, k, v, layout, SCALE)
    reference = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(0))
    _, _, found = kernel_attend(
        *(x.to(DEVICE) for x in (q, k, v)),
        selector.select(*(x.to(DEVICE) for x in (q, k, v)), layout, SCALE),
        layout,
        None,
        SCALE,
        settings=TILE,
        reference=reference.to(DEVICE),
    )
    assert found is not None
    logits = q @ k.repeat_interleave(2, 1).mT * SCALE - reference[..., None]
    side = selection.q_side
    for i in range(len(side)):
        rows = side.tokens[0, 0, i][: int(side.length[0, 0, i])]
        for j in range(len(side)):
            columns = side.tokens[0, 0, j][: int(side.length[0, 0, j])]
            largest = logits[:, :, rows][..., columns].amax((-1, -2))
            expected = largest.masked_fill(selection.levels[:, :, i, j] == 0, -torch.inf)
            assert torch.allclose(found[:, :, i, j].cpu(), expected, atol=1e-5)


def test_float16_is_within_its_bound() -> None:
    layout = LAYOUTS["odd"]
    q, k, v = (x.half().to(DEVICE) for x in tensors(layout))
    selection = Pyramid(block=16, pooled=True).select(q, k, v, layout, SCALE)
    exact, _ = attend(q.double(), k.double(), v.double(), selection, layout, None, SCALE)
    found, _, _ = kernel_attend(q, k, v, selection, layout, None, SCALE, settings=TILE)
    assert found.dtype == torch.float16
    assert float((found.double() - exact).abs().max()) < 4e-3 * float(exact.abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU: the selectors above ran in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in SMALL if name != "reuse"])
def test_selectors_on_this_gpu(name: str, dtype: torch.dtype) -> None:
    """At the launch table's tiles, against the oracle with the same choice."""
    layout = TokenLayout(Grid(5, 12, 12), text_after=31)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, layout.length, 64, generator=generator).to(DEVICE, dtype)
        for heads in (4, 2, 2)
    )
    selector = small(name)
    selection = selector.select(q, k, v, layout, 0.125, kernels=True)
    found, lse, _ = kernel_attend(q, k, v, selection, layout, None, 0.125)
    exact, exact_lse = attend(q.double(), k.double(), v.double(), selection, layout, None, 0.125)
    eager, _ = reference_attend(q, k, v, selection, layout, None, 0.125)
    bound = (eager.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert float((found.double() - exact).abs().max()) <= 2 * float(bound)
    assert float((lse.double() - exact_lse).abs().nan_to_num(0).max()) < 0.02


@pytest.mark.second
@pytest.mark.parametrize("block", [16, 20], ids=["tiles", "no tiles"])
def test_skip_lists_by_the_kernels_are_those_of_plain_torch(block: int) -> None:
    layout = TokenLayout(Grid(2, 6, 8), text_after=3)
    pattern = SkipList(0.3, block=block, order="raster")
    q, k, v = (1.5 * x.float() for x in tensors(layout, 1))
    outputs: dict[str, list[torch.Tensor]] = {"triton": [], "blockwise": []}
    skipped: dict[str, torch.Tensor] = {}
    for backend, found in outputs.items():
        choice, memory = Choice(backend, "asked for"), Memory()
        spec = AttentionSpec((pattern,) * 4, layout, scale=SCALE, backend=backend, choice=choice)
        device = DEVICE if backend == "triton" else torch.device("cpu")
        for step in range(3):
            memory.begin(step, 9)
            own = (x.to(device) for x in (q + 0.05 * step, k, v))
            out, _ = execute(*own, spec, memory)
            found.append(out.cpu())
        bits = memory.past(pattern).skipped
        assert bits is not None
        skipped[backend] = unpacked(bits, 3 * 8)
    assert 0.02 < skipped["blockwise"].float().mean() < 0.95
    assert torch.equal(skipped["triton"].cpu(), skipped["blockwise"])
    for own, other in zip(*outputs.values(), strict=True):
        assert torch.allclose(own, other, atol=1e-5)


def test_reuse_serves_the_kernels_choice() -> None:
    layout = LAYOUTS["line"]
    q, k, v = (x.float().to(DEVICE) for x in tensors(layout))
    memory = Memory()
    spec = AttentionSpec(
        (Reuse(TopBlocks(0.4, block=4), every=2),) * 4,
        layout,
        scale=SCALE,
        backend="triton",
        return_lse=True,
        choice=Choice("triton", "asked for"),
    )
    found = []
    for step in range(3):
        memory.begin(step, 9)
        found.append(execute(q, k, v, spec, memory)[0])
    assert (memory.made, memory.reused) == (2, 1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.second
def test_many_pairs_are_worked_on_in_parts() -> None:
    layout = LAYOUTS["odd"]
    q, k, v = (x.float().to(DEVICE) for x in tensors(layout))
    selection = MoBA(0.4, block=8).select(q, k, v, layout, SCALE)
    side = selection.k_side
    lanes = (*k.shape[:2], len(side) * 16, k.shape[3])
    keys = Keys(k.new_empty(lanes), k.new_empty(lanes), k.new_empty(lanes[:3]))
    for x, mean, bias in ((k, keys.k, keys.bias), (v, keys.v, None)):
        summarise(x, side.tokens32, side.length32, part=1, width=16, mean=mean, bias=bias)
    tokens = selection.q_side.tokens32
    settings = {"tile": (16, 16), "warps": 4, "stages": 1}
    whole = queries_forward(q, selection.levels, tokens, keys, SCALE, **settings)
    parts = queries_forward(q, selection.levels, tokens, keys, SCALE, most=60, **settings)
    for own, other in zip(parts, whole, strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-6)


def test_bits_of_a_mask() -> None:
    mask = torch.rand(2, 3, 21, generator=torch.Generator().manual_seed(0)) < 0.5
    assert packed(mask).shape == (2, 3, 3) and torch.equal(unpacked(packed(mask), 21), mask)


def test_a_share_that_is_not_crossed_has_no_kernel() -> None:
    scores = torch.randn(1, 1, 3, 9)
    length, forced = torch.full((1, 1, 9), 4), torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    assert kernel_levels(TopP(0.5, crossing=False), scores, length, forced) is None
