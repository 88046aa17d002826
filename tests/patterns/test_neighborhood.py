"""Neighborhood attention against NATTEN's own CPU result."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from visattn import Grid, TokenLayout, sparse_attention
from visattn.patterns import Neighborhood

CASES = 72


def draw_case(seed: int) -> tuple[tuple[int, ...], Neighborhood]:
    """A random problem with windows of at least 2, over 1 to 3 axes."""
    rng = random.Random(seed)
    ndim = seed % 3 + 1
    extent = tuple(rng.randint(3, (40, 12, 8)[ndim - 1]) for _ in range(ndim))
    dilation = tuple(rng.randint(1, max(1, min(3, n // 2))) for n in extent)
    window = tuple(rng.randint(2, n // d) for n, d in zip(extent, dilation, strict=True))
    stride = tuple(rng.randint(1, w) for w in window)
    causal = tuple(rng.random() < 0.3 for _ in extent)
    return extent, Neighborhood(window, stride, dilation, causal)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("seed", range(CASES))
def test_equals_natten(seed: int) -> None:
    import natten

    extent, pattern = draw_case(seed)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, *extent, 32, generator=generator) for _ in range(3))
    function = {1: natten.functional.na1d, 2: natten.functional.na2d, 3: natten.functional.na3d}[
        len(extent)
    ]
    heads_last = [x.movedim(1, -2).contiguous() for x in (q, k, v)]
    expected = function(
        *heads_last,
        kernel_size=pattern.window,
        stride=pattern.stride,
        dilation=pattern.dilation,
        is_causal=pattern.causal,
        backend="flex-fna",
    ).movedim(-2, 1)
    layout = TokenLayout(Grid(*((1,) * (3 - len(extent)) + extent)))
    out = sparse_attention(*(x.flatten(2, -2) for x in (q, k, v)), pattern, layout)
    torch.testing.assert_close(out.view(expected.shape), expected, rtol=0, atol=2e-6)


def test_natten_cases_cover_the_parameters() -> None:
    patterns = [draw_case(seed)[1] for seed in range(CASES)]

    def any_axis(name: str, wanted: int | bool) -> int:
        return sum(wanted in getattr(pattern, name) for pattern in patterns)

    assert CASES >= 60
    assert min(any_axis("dilation", 2), any_axis("stride", 2), any_axis("causal", True)) > 10
    assert {size % 2 for pattern in patterns for size in pattern.window} == {0, 1}


def brute(length: int, window: int, stride: int, dilation: int, causal: bool) -> torch.Tensor:
    """One axis, from the definition: walk every residue class and move the window inward."""
    out = torch.zeros(length, length, dtype=torch.bool)
    for group in range(dilation):
        members = list(range(group, length, dilation))
        for place, query in enumerate(members):
            leader = min(
                place // stride * stride + (stride - 1 if causal else stride // 2), len(members) - 1
            )
            if causal:
                seen = range(max(0, leader - window + 1), place + 1)
            else:
                first = min(max(leader - window // 2, 0), len(members) - window)
                seen = range(first, first + window)
            out[query, [members[key] for key in seen]] = True
    return out


def test_every_axis_parameter_against_the_definition() -> None:
    """All windows (1 included), strides, dilations and flags on axes of up to 9 tokens."""
    count = 0
    for length, window, causal in itertools.product(range(1, 10), range(1, 10), (False, True)):
        for dilation in range(1, length // window + 1):
            for stride in range(1, window + 1):
                layout = TokenLayout(Grid(1, 1, length))
                place = torch.arange(length)
                kept = Neighborhood((window,), (stride,), (dilation,), (causal,)).allows(
                    place[:, None], place, layout
                )
                assert torch.equal(kept, brute(length, window, stride, dilation, causal))
                count += 1
    assert count > 300


def test_window_of_the_whole_axis_is_dense() -> None:
    assert Neighborhood((1.0, 1.0, 1.0)).density(TokenLayout(Grid(3, 4, 5), text_after=2)) == 1.0


def test_stride_of_the_window_is_block_attention() -> None:
    from visattn.patterns import Block

    layout, place = TokenLayout(Grid(4, 6, 8)), torch.arange(192)
    strided = Neighborhood((2, 3, 4), (2, 3, 4)).allows(place[:, None], place, layout)
    assert torch.equal(strided, Block((2, 3, 4)).allows(place[:, None], place, layout))
