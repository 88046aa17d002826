"""Gradients by the kernels against autograd through the float64 oracle.

A gradient is within the bound when ``max|kernel - f64| <= 3 max|eager - f64| + 2 ulp`` of its
largest value, eager being autograd through the reference in the same dtype: the kernels round the
weights and the gradient of the logits to the dtype of q before they multiply them, and the
interpreter's products are numpy's.
"""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from support.cases import LAYOUTS, draw
from support.kernel_cases import (
    DEVICE,
    DTYPES,
    GPU,
    HEAD_SIZES,
    MIXED,
    UNIONS,
    WALKED,
    case,
    inputs,
)
from support.kernel_walk import REDUCED

from visattn import TokenLayout, sparse_attention
from visattn.attention.backends.triton_kernels import triton_attention, triton_backward
from visattn.attention.spec import AttentionSpec
from visattn.geometry.layout import check_text_lengths
from visattn.kernels.launch import backward_launch_of
from visattn.kernels.targets import Launch
from visattn.patterns import PATTERNS, Dense, Diagonal, Neighborhood, Pattern, Skip

Settings = tuple[tuple[int, int], tuple[int, int], int, int]
SOME = {  # what is interpreted
    torch.float32: ("frame_1_of_11x3", "video_7x5x3_text_31"),
    torch.float16: ("two_grids_text_between",),
}
SETTINGS: Settings = ((32, 32), (16, 8), 4, 1)


def grads_of(
    qkv: list[torch.Tensor], grad_out: torch.Tensor, grad_lse: torch.Tensor, **call: object
) -> tuple[torch.Tensor, ...]:
    """By autograd through the reference."""
    own = [x.detach().requires_grad_() for x in qkv]
    out, lse = sparse_attention(*own, backend="reference", return_lse=True, **call)  # type: ignore[call-overload]
    loss = (out * grad_out.to(out.dtype)).sum()
    loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * grad_lse.to(lse.dtype)).sum()
    return torch.autograd.grad(loss, own)


def check(
    qkv: list[torch.Tensor],
    patterns: list[Pattern],
    layout: TokenLayout,
    lengths: torch.Tensor | None = None,
    settings: Settings = SETTINGS,
) -> None:
    """Run forward and backward and hold the gradients to the bound."""
    q, k, v = qkv
    scale = q.shape[3] ** -0.5
    checked = None if lengths is None else check_text_lengths(lengths, layout, q.shape[0])
    checked = None if checked is None else checked.to(DEVICE)
    spec = AttentionSpec(tuple(patterns), layout, text_lengths=checked, scale=scale)
    block = Launch(*settings[0], *settings[2:])
    out, lse = triton_attention(q, k, v, spec, settings=block)
    generator = torch.Generator().manual_seed(2)
    grad_out = torch.randn(out.shape, generator=generator).to(out)
    grad_lse = torch.randn(lse.shape, generator=generator).to(lse)
    grad_lse[lse == -torch.inf] = 0
    found = triton_backward(q, k, v, out, lse, grad_out, grad_lse, spec, settings=settings)
    call = {"pattern": patterns, "layout": layout, "text_lengths": lengths, "scale": scale}
    exact = grads_of([x.double() for x in qkv], grad_out, grad_lse, **call)
    eager = grads_of(qkv, grad_out, grad_lse, **call)
    for name, x, plain, truth in zip("qkv", found, eager, exact, strict=True):
        assert x.dtype == q.dtype and x.shape == truth.shape
        error = (x.double() - truth).abs().max()
        ulp = torch.finfo(q.dtype).eps * truth.abs().max()
        allowed = 3 * (plain.double() - truth).abs().max() + 2 * ulp
        assert error <= allowed, (name, float(error), float(allowed), patterns)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "layout_name", "dtype"),
    [(*call, dtype) for call, dtype in zip(REDUCED, cycle(DTYPES), strict=False)],
)
def test_reduced_walk_is_within_the_bound(name: str, layout_name: str, dtype: torch.dtype) -> None:
    """Its traits are compared with those of the full walk in ``test_forward.py``."""
    pattern, layout, lengths = case(name, layout_name)
    check(inputs(layout, 1, 1, 16, dtype), [pattern], layout, lengths)


@pytest.mark.second
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_is_within_the_bound(name: str, dtype: torch.dtype) -> None:
    """On one frame, on a ragged video with text, and on two grids; a GPU walks them all, in every
    dtype."""
    for layout_name in WALKED if GPU else SOME[dtype]:
        pattern, layout, lengths = case(name, layout_name)
        check(inputs(layout, 1, 1, 16, dtype), [pattern], layout, lengths)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_mixed_heads_grouped_queries_and_batch(key_heads: int) -> None:
    layout = LAYOUTS["video_3x3x3"]
    lengths = torch.tensor([2, 0])
    check(inputs(layout, 4, key_heads, 24, torch.float32, batch=2), MIXED, layout, lengths)


@pytest.mark.second
@pytest.mark.parametrize("dim", [16, 40, 64, 128, 256])
def test_head_sizes(dim: int) -> None:
    layout = LAYOUTS["image_7x7"]
    # several heads, so that the largest error of eager attention is not that of one lucky draw
    check(inputs(layout, 4, 4, dim, torch.float32), [Neighborhood(3)] * 4, layout)
    check(inputs(layout, 4, 4, dim, torch.float16), [Diagonal(9)] * 4, layout)


@pytest.mark.second
@pytest.mark.parametrize("name", UNIONS)
def test_every_kind_of_predicate(name: str) -> None:
    """Also beside a head that uses none of them."""
    layout = LAYOUTS["video_5x5x5"]
    check(inputs(layout, 2, 2, 16, torch.float32), [UNIONS[name], Diagonal(0)], layout)


@pytest.mark.second
def test_strides_other_than_contiguous() -> None:
    layout = LAYOUTS["video_7x5x3_text_31"]
    qkv = inputs(layout, 2, 2, 16, torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    check(turned, [Neighborhood((3, 3, 3)), Dense()], layout)


def test_gradients_are_the_same_every_time() -> None:
    layout = LAYOUTS["video_5x5x5" if GPU else "video_3x3x3"]  # only a GPU sums in any order
    q, k, v = inputs(layout, 2, 1, 16, torch.float32)
    heads = (draw("neighborhood", layout, 1), Skip())

    def run() -> tuple[torch.Tensor, ...]:
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out = sparse_attention(*own, heads, layout, backend="triton")
        return torch.autograd.grad(out.square().sum(), own)

    for x, y in zip(run(), run(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("masks_as_bits")
@pytest.mark.parametrize(
    "name",
    [
        "radial",
        pytest.param("neighborhood", marks=pytest.mark.second),
        pytest.param("stripe", marks=pytest.mark.second),
    ],
)
def test_masks_that_are_packed_as_bits(name: str) -> None:
    """Of short blocks too, and beside lengths of a call."""
    for layout_name in ("two_grids_text_between", "video_7x4x6"):
        pattern, layout, lengths = case(name, layout_name)
        check(inputs(layout, 2, 1, 16, torch.float32), [pattern, Dense()], layout, lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU: the walk above ran in Triton's interpreter")
@pytest.mark.parametrize("dtype", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_launch_settings_of_this_gpu(name: str, dtype: torch.dtype) -> None:
    """The same bound with the launch tables' own blocks."""
    for layout_name in ("video_4x11x7_unaligned", "two_grids_text_between"):
        pattern, layout, lengths = case(name, layout_name)
        qkv = inputs(layout, 2, 1, HEAD_SIZES[dtype], dtype)
        settings = backward_launch_of(qkv[0])
        check(qkv, [pattern, Dense()], layout, lengths, settings=settings)
