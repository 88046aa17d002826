"""Gradients of dynamic patterns by the kernels, against autograd through the float64 form."""

from __future__ import annotations

import pytest
import torch
from support.selectors_oracle import LAYOUTS, SCALE, SMALL, lengths, small, tensors

from visattn import TokenLayout, sparse_attention
from visattn.attention.choice import BackendUnavailable
from visattn.attention.dispatch import execute
from visattn.attention.spec import AttentionSpec, Choice
from visattn.geometry.orders import LineOrder
from visattn.kernels import levels_backward
from visattn.patterns import Dense, Diagonal
from visattn.selectors import MoBA, PooledRest, Pyramid, SampledRest, Selection, TopBlocks
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.gradients import LevelAttention
from visattn.selectors.stages.blocks import partition_by_order

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NONE = ("pisa", "rectified", "skip_list")  # corrected, first-order, recorded: plain torch


def gradients_agree(selection: Selection, layout: TokenLayout) -> None:
    q, k, v = (x.float() for x in tensors(layout, 1))
    texts = lengths(layout, 1)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = LevelAttention.apply(*own, selection, layout, texts, SCALE)
    true, true_lse = attend(*exact, selection, layout, texts, SCALE)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(out.shape, generator=generator)
    grad_lse = torch.randn(lse.shape, generator=generator).masked_fill(lse == -torch.inf, 0)

    def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        finite = lse.masked_fill(lse == -torch.inf, 0)
        return (out * grad.to(out)).sum() + (finite * grad_lse.to(lse)).sum()

    found = torch.autograd.grad(loss(out, lse), own)
    expected = torch.autograd.grad(loss(true, true_lse), exact)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32 and bool(x.isfinite().all())
        assert (x - y).abs().max() <= 1e-5 * max(1.0, float(y.abs().max()))


@pytest.mark.second
@pytest.mark.skipif(GPU, reason="sides are on the CPU")
@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("reuse", *NONE)])
def test_every_selector(name: str) -> None:
    layout = LAYOUTS["odd"]
    q, k, v = (x.float() for x in tensors(layout, 1))
    gradients_agree(small(name).select(q, k, v, layout, SCALE), layout)


@pytest.mark.second
@pytest.mark.skipif(GPU, reason="sides are on the CPU")
@pytest.mark.parametrize("rest", [None, PooledRest(), PooledRest(True), SampledRest(5)], ids=str)
def test_random_levels(rest: PooledRest | SampledRest | None) -> None:
    """Rows that see nothing, every level, queries of which several share a row, text."""
    layout = LAYOUTS["video"]
    generator = torch.Generator().manual_seed(3)
    q_side = partition_by_order(layout, (LineOrder(),), 13, torch.device("cpu"))
    k_side = partition_by_order(layout, (LineOrder("wth"),), 8, torch.device("cpu"))
    values = (1, 2, 3, 8)
    levels = torch.randint(0, 5, (1, 4, len(q_side), len(k_side)), generator=generator)
    levels = torch.tensor([0, *values])[levels].to(torch.uint8)
    levels[..., ~k_side.grid] = 1
    levels[:, :, ~q_side.grid] = 1
    variance = isinstance(rest, PooledRest) and rest.variance
    selection = Selection.of(q_side, k_side, levels, values, rest, variance=variance)
    if rest is None:
        selection.levels[0, 1, 0] = 0
    gradients_agree(selection, layout)


@pytest.mark.second
@pytest.mark.skipif(GPU, reason="sides are on the CPU")
def test_single_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS["video"]
    q, k, v = (x.float() for x in tensors(layout, 1))
    selection = MoBA(0.3, block=24).select(q, k, v, layout, SCALE)
    gradients_agree(selection, layout)
    original = levels_backward.level_backward.__kwdefaults__
    monkeypatch.setitem(original, "most", 200)
    gradients_agree(selection, layout)


@pytest.mark.parametrize("name", NONE)
def test_what_has_none_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Asked for, it is refused; else plain torch runs, and says so once."""
    layout = LAYOUTS["odd"]
    own = [x.float().to(DEVICE).requires_grad_() for x in tensors(layout, 1)]
    call = {"layout": layout, "text_lengths": lengths(layout, 1), "scale": SCALE}
    with pytest.raises(BackendUnavailable, match="has no gradients of"):
        sparse_attention(*own, small(name), backend="triton", **call)  # type: ignore[call-overload]
    spec = AttentionSpec(
        (small(name),) * 4,
        layout,
        text_lengths=lengths(layout, 1),
        scale=SCALE,
        choice=Choice("triton", "a test"),
    )
    for _ in range(2):
        out, _ = execute(*own, spec)
        torch.autograd.grad(out.square().sum(), own)
    assert sum("plain torch computes" in line for line in caplog.messages) == 1


def test_mixed_heads_have_gradients() -> None:
    """Static and dynamic heads beside each other, as the reference has them."""
    layout = LAYOUTS["odd"]
    heads = (Dense(), TopBlocks(0.4, block=8), Diagonal(4), Pyramid(block=8, pooled=True))
    grads = []
    for backend in ("triton", "reference"):
        own = [x.float().to(DEVICE).requires_grad_() for x in tensors(layout, 1)]
        out = sparse_attention(*own, heads, layout, backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), own))
    for x, y in zip(*grads, strict=True):
        assert (x - y).abs().max() <= 2e-5 * float(y.abs().max())
