"""The kernels against the float64 oracle: interpreted without a GPU, compiled with one.

A launch is within the bound when ``max|kernel - f64| <= 1.5 max|eager - f64| + 1 ulp``, eager
being the reference in the same dtype. New tensors are filled with NaN, so that a row left
unwritten is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle

import numpy as np
import pytest
import torch
from support.cases import LAYOUTS
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
from support.kernel_walk import FULL, REDUCED, missing, tile_steps

from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.backends.triton_kernels import triton_attention
from visattn.attention.lowering import lower_cached
from visattn.attention.spec import AttentionSpec
from visattn.blocks.device_lists import device_maps
from visattn.geometry.layout import check_text_lengths
from visattn.kernels.forward import describable
from visattn.kernels.launch import launch_of
from visattn.kernels.targets import Launch
from visattn.patterns import (
    PATTERNS,
    Dense,
    Diagonal,
    Neighborhood,
    Pattern,
    Radial,
    Skip,
    Stripe,
)

SETTINGS = Launch(16, 32, 4, 1)
BLOCKS = [SETTINGS[:2], (32, 32)]  # of the walks forward and backward
LIMIT = 15_000  # tile steps of the full walk in two dtypes
REDUCED_LIMIT = 500


@contextmanager
def products_of_the_interpreter() -> Iterator[None]:
    """Float32 matrix products as Triton's interpreter takes them, by numpy: over 256 terms they are
    1.6 times as far off as torch's, and eager must not be judged by better products."""
    torch_product = torch.Tensor.__matmul__

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if GPU or a.dtype != torch.float32:
            return torch_product(a, b)
        return torch.from_numpy(np.matmul(a.numpy(), np.ascontiguousarray(b.numpy())))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", product)
        yield


def check(
    qkv: list[torch.Tensor],
    patterns: list[Pattern],
    layout: TokenLayout,
    lengths: torch.Tensor | None = None,
    settings: Launch = SETTINGS,
    split: int | None = None,
    scale: float | None = None,
) -> None:
    """Run the kernels and hold output and LSE to the bound."""
    q, k, v = qkv
    factor = q.shape[3] ** -0.5 if scale is None else scale
    checked = None if lengths is None else check_text_lengths(lengths, layout, q.shape[0])
    checked = None if checked is None else checked.to(DEVICE)
    spec = AttentionSpec(tuple(patterns), layout, text_lengths=checked, scale=factor)
    out, lse = triton_attention(q, k, v, spec, settings=settings, split=split)
    run = partial(sparse_attention, pattern=patterns, layout=layout, text_lengths=lengths)
    run = partial(run, scale=factor, backend="reference", return_lse=True)
    exact, exact_lse = run(q.double(), k.double(), v.double())
    with products_of_the_interpreter():
        eager, eager_lse = run(q, k, v)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    rounding = 2 if q.dtype == torch.bfloat16 and not GPU else 1  # interpreted, bf16 is truncated
    for name, found, plain, truth, eps in (
        ("output", out, eager, exact, torch.finfo(q.dtype).eps),
        ("lse", lse[~empty], eager_lse[~empty], exact_lse[~empty], torch.finfo(torch.float32).eps),
    ):
        if truth.numel() == 0:
            continue
        error = (found.double() - truth).abs().max()
        allowed = 1.5 * (plain.double() - truth).abs().max() + rounding * eps * truth.abs().max()
        assert error <= allowed, (name, float(error), float(allowed), patterns)


@pytest.mark.parametrize(
    ("name", "layout_name", "dtype"),
    [(*call, dtype) for call, dtype in zip(REDUCED, cycle(DTYPES), strict=False)],
)
def test_reduced_walk_is_within_the_bound(name: str, layout_name: str, dtype: torch.dtype) -> None:
    pattern, layout, lengths = case(name, layout_name)
    check(inputs(layout, 1, 1, 16, dtype), [pattern], layout, lengths)


@pytest.mark.second
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout_name", WALKED)
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_is_within_the_bound(name: str, layout_name: str, dtype: torch.dtype) -> None:
    pattern, layout, lengths = case(name, layout_name)
    check(inputs(layout, 1, 1, 16, dtype), [pattern], layout, lengths)


@pytest.mark.parametrize("block", BLOCKS)
def test_reduced_walk_has_every_trait_of_the_full_one(block: tuple[int, int]) -> None:
    """Where this fails, a pattern brought a trait: add the call that has it to ``REDUCED``."""
    assert missing(block, REDUCED) == {}
    assert missing(block, [call for call in REDUCED if call[0] != "diagonal"]) != {}


def test_walks_stay_within_their_tile_steps() -> None:
    """The interpreter takes up to 8 ms for each, so the suite's time is designed here."""
    assert 1_000 < 2 * sum(tile_steps(*call, SETTINGS[:2]) for call in FULL) < LIMIT
    assert sum(tile_steps(*call, SETTINGS[:2]) for call in REDUCED) < REDUCED_LIMIT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_mixed_heads_grouped_queries_and_batch(key_heads: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS["video_3x3x3"]
    lengths = torch.tensor([2, 0])
    check(inputs(layout, 4, key_heads, 24, dtype, batch=2), MIXED, layout, lengths)


@pytest.mark.second
@pytest.mark.parametrize("dim", [16, 24, 32, 40, 64, 72, 80, 96, 128, 160, 256])
def test_head_sizes(dim: int) -> None:
    layout = LAYOUTS["image_7x7"]
    check(inputs(layout, 1, 1, dim, torch.float32), [Neighborhood(3)], layout)
    check(inputs(layout, 1, 1, dim, torch.float16), [Diagonal(9)], layout)


@pytest.mark.second
@pytest.mark.parametrize("dim", [16, 40, 96, 128])
def test_tensor_descriptors(dim: int) -> None:
    """Also of tokens outside heads, of padded head sizes, and of rows that none can describe."""
    described = SETTINGS._replace(descriptors=True)
    layout = LAYOUTS["video_5x5x5"]
    q, k, v = inputs(layout, 4, 2, dim, torch.float16)
    assert describable(k)
    check([q, k, v], MIXED, layout, settings=described)
    patterns = [Skip(), Diagonal(40), Skip(), Dense()]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    check(turned, patterns, layout, settings=described)
    uneven = [torch.nn.functional.pad(x, (0, 3))[..., :dim] for x in turned]
    assert not describable(uneven[1])
    check(uneven, [Diagonal(40)] * 4, layout, settings=described)


def test_bfloat16() -> None:
    layout = LAYOUTS["prefix_and_text"]
    check(inputs(layout, 2, 2, 32, torch.bfloat16), [Radial(), Stripe()], layout)


@pytest.mark.second
@pytest.mark.parametrize("split", [1, 2, 3])
def test_long_rows_are_split_and_merged(split: int) -> None:
    layout = LAYOUTS["video_6x6x7_both_texts"]
    lengths = torch.tensor([[3, 2]])
    patterns: list[Pattern] = [Dense(), Neighborhood((3, 3, 3)), Skip()]
    check(inputs(layout, 3, 1, 16, torch.float32), patterns, layout, lengths, split=split)
    maps = [lower_cached(p, layout, None, *SETTINGS[:2]) for p in patterns]
    packed = device_maps(maps, 1, torch.device("cpu"), split)
    assert packed.num_parts > 2 * split
    work = packed.lists["work"]
    visits = work[:, 11] - work[:, 7]
    assert bool((visits.diff() <= 0).all())  # heaviest first
    assert int(visits.max()) <= split
    assert int(visits.sum()) == sum(m.num_visited for m in maps)


# A band, residues and a radial rule, in slots that the other head leaves unused.
UNUSED = ("two_bands", "strided", "other_radial")


@pytest.mark.parametrize(
    "name",
    [name if name in UNUSED else pytest.param(name, marks=pytest.mark.second) for name in UNIONS],
)
def test_every_kind_of_predicate(name: str) -> None:
    """Also beside a head that uses none of them."""
    layout = LAYOUTS["video_5x5x5"]
    check(inputs(layout, 2, 2, 16, torch.float32), [UNIONS[name], Diagonal(0)], layout)


def test_kinds_that_two_slots_cannot_hold_go_to_bits() -> None:
    layout = LAYOUTS["video_5x5x5"]
    heads: list[Pattern] = [Diagonal(3), Neighborhood(3), Radial(rule="token"), Stripe(False, (3,))]
    maps = [lower_cached(p, layout, None, 16, 32) for p in heads]
    assert device_maps(maps, 4, torch.device("cpu")).kinds == (6, 0)
    check(inputs(layout, 4, 4, 16, torch.float32), heads, layout)


@pytest.mark.usefixtures("masks_as_bits")
@pytest.mark.parametrize("name", ["neighborhood", "radial", "stripe"])
def test_masks_that_are_packed_as_bits(name: str) -> None:
    """Of short blocks too, and beside lengths of a call."""
    for layout_name in ("two_grids_text_between", "video_7x4x6"):
        pattern, layout, lengths = case(name, layout_name)
        check(inputs(layout, 2, 1, 16, torch.float32), [pattern, Diagonal(3)], layout, lengths)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale: float) -> None:
    layout = LAYOUTS["video_3x3x3"]
    check(inputs(layout, 1, 1, 16, torch.float32), [Diagonal(5)], layout, scale=scale)


def test_large_logits_do_not_overflow() -> None:
    layout = LAYOUTS["video_3x3x3"]
    q, k, v = inputs(layout, 1, 1, 16, torch.float32)
    check([100 * q, 100 * k, v], [Neighborhood(3)], layout)


def test_strides_other_than_contiguous() -> None:
    """Diffusers hands over ``[B, L, H, D]``."""
    layout = LAYOUTS["prefix_and_text"]
    qkv = inputs(layout, 2, 2, 16, torch.float32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    for patterns in ([Diagonal(5), Stripe()], [Neighborhood((3, 3, 3))] * 2):
        check(turned, patterns, layout)


def test_offsets_beyond_31_bits() -> None:
    """The second batch item lies 2^31 elements behind the first; untouched pages cost no memory."""
    layout = LAYOUTS["image_7x7"]
    tokens, dim = layout.length, 16
    apart = 2**31 + 64
    values = inputs(layout, 1, 1, dim, torch.float16, batch=2)
    far = []
    for value in values:
        storage = torch.UntypedStorage(2 * (apart + tokens * dim), device=DEVICE)
        view = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(
            storage, 0, (2, 1, tokens, dim), (apart, tokens * dim, dim, 1)
        )
        view.copy_(value)
        far.append(view)
    for pattern in (Diagonal(9), Neighborhood(3)):
        check(far, [pattern], layout)


def test_layouts_of_text_alone_and_one_long_row() -> None:
    from visattn import Segment

    text = TokenLayout(segments=[Segment("text", 45)])
    check(inputs(text, 1, 1, 16, torch.float32), [Dense()], text, torch.tensor([17]))
    line = TokenLayout(Grid(1, 1, 300))
    check(inputs(line, 1, 1, 16, torch.float32), [Stripe(False, (299,))], line)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no GPU: the walk above ran in Triton's interpreter")
@pytest.mark.parametrize("dtype", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_launch_settings_of_this_gpu(name: str, dtype: torch.dtype) -> None:
    """The same bound with the launch table's own blocks, at the head sizes that models have. What
    has a kernel of its own architecture runs in ``test_hopper.py``."""
    for layout_name in ("video_8x8x8_aligned", "video_4x11x7_unaligned", "two_grids_text_between"):
        pattern, layout, lengths = case(name, layout_name)
        qkv = inputs(layout, 2, 1, HEAD_SIZES[dtype], dtype)
        settings = launch_of(qkv[0])._replace(warp_groups=False)
        check(qkv, [pattern, Dense()], layout, lengths, settings=settings)
