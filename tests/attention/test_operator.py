"""The operator: numbers against torch, merging by LSE, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.cases import EXAMPLES
from torch.nn.functional import scaled_dot_product_attention

from visattn import Grid, Segment, TokenLayout, sparse_attention
from visattn.attention import choose_backend, merge_attention
from visattn.attention.backends.triton_kernels import DEVICE_MAPS
from visattn.attention.lowering import MAPS
from visattn.geometry.orders import BoxOrder, sequence_blocks
from visattn.patterns import (
    Block,
    Dense,
    Diagonal,
    GridBlocks,
    Halo,
    Neighborhood,
    Pattern,
    Radial,
    Sharded,
    ShiftedBlock,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Union,
)
from visattn.selectors import TopBlocks

LAYOUT = TokenLayout(Grid(3, 5, 6), text_after=11)
PLAIN = ["blockwise", "reference"]  # the kernels have tests of their own


def qkv(
    batch: int = 2,
    heads: int = 2,
    length: int = LAYOUT.length,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, dim, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", ["auto", *PLAIN])
@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
def test_dense_is_torchs_attention(backend: str, scale: float | None) -> None:
    q, k, v = qkv(dtype=torch.float64)
    out, lse = sparse_attention(
        q, k, v, Dense(), LAYOUT, scale=scale, backend=backend, return_lse=True
    )
    torch.testing.assert_close(
        out, scaled_dot_product_attention(q, k, v, scale=scale), rtol=0, atol=1e-13
    )
    logits = q @ k.mT * (0.25 if scale is None else scale)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "pattern", [Radial(), Neighborhood((2, 3, 3)), Stripe(), Diagonal(20)], ids=repr
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_blockwise_error_is_within_that_of_eager(
    pattern: object, dtype: torch.dtype, return_lse: bool
) -> None:
    """max|blockwise - f64| <= 1.5 max|eager - f64| + 1 ulp, inputs rounded to the dtype first."""
    assert isinstance(pattern, (Radial, Neighborhood, Stripe, Diagonal))
    q, k, v = qkv(dtype=dtype)
    exact = sparse_attention(
        q.double(), k.double(), v.double(), pattern, LAYOUT, backend="reference"
    )
    eager = sparse_attention(q, k, v, pattern, LAYOUT, backend="reference")
    result = sparse_attention(q, k, v, pattern, LAYOUT, backend="blockwise", return_lse=return_lse)
    out = result[0] if isinstance(result, tuple) else result
    ulp = torch.finfo(dtype).eps * float(exact.abs().max())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= 1.5 * (eager.double() - exact).abs().max() + ulp


@pytest.mark.parametrize("backend", PLAIN)
def test_lse_dtype_and_rows_without_a_key(backend: str) -> None:
    q, k, v = qkv(dtype=torch.float16)
    out, lse = sparse_attention(
        q, k, v, [Skip(), Dense()], LAYOUT, backend=backend, return_lse=True
    )
    assert out.dtype == torch.float16 and lse.dtype == torch.float32
    assert bool((out[:, 0] == 0).all()) and bool((lse[:, 0] == -torch.inf).all())
    assert bool(out[:, 1].isfinite().all()) and bool(lse[:, 1].isfinite().all())
    text = TokenLayout(segments=[Segment("text", 8)])
    none = sparse_attention(
        *(x[:, :, :8] for x in (q, k, v)),
        Dense(),
        text,
        text_lengths=torch.tensor([0, 3]),
        backend=backend,
    )
    assert (
        bool((none[0] == 0).all()) and bool(none[1].isfinite().all()) and bool((none[1] != 0).any())
    )


def test_text_beyond_its_length_is_as_if_it_were_not_there() -> None:
    q, k, v = qkv()
    lengths = torch.tensor([4, 7], dtype=torch.int32)
    short = TokenLayout(Grid(3, 5, 6), text_after=4)
    for backend in PLAIN:
        out = sparse_attention(q, k, v, Diagonal(5), LAYOUT, text_lengths=lengths, backend=backend)
        cut = [x[:1, :, :94] for x in (q, k, v)]
        own = sparse_attention(*cut, Diagonal(5), short, backend=backend)
        torch.testing.assert_close(out[:1, :, :94], own, rtol=0, atol=1e-6)


TWINS = [
    (Neighborhood(1), Neighborhood(1.0)),
    (Diagonal(1), Diagonal(1.0)),
    (Stripe(False, (1,)), Stripe(False, (0.5, 1.0))),
    (Stencil((1, 5, 6), ((0, 0, 0),)), Stencil((1.0, 5, 6), ((0, 0, 0),))),
    (Block(1), Block(1.0)),
]


@pytest.mark.parametrize(("tokens", "fraction"), TWINS, ids=repr)
def test_one_token_is_not_the_whole_axis(tokens: Pattern, fraction: Pattern) -> None:
    """1 == 1.0 in Python, so that a cache keyed by value would mix the two up."""
    assert tokens != fraction
    assert tokens.density(LAYOUT) != fraction.density(LAYOUT)
    q, k, v = qkv(heads=2)
    for backend in PLAIN:
        both = sparse_attention(q, k, v, [tokens, fraction], LAYOUT, backend=backend)
        for head, pattern in enumerate((tokens, fraction)):
            own = [x[:, head : head + 1] for x in (q, k, v)]
            alone = sparse_attention(*own, pattern, LAYOUT, backend="reference")
            torch.testing.assert_close(both[:, head : head + 1], alone, rtol=0, atol=1e-6)


def test_patterns_written_alike_are_equal() -> None:
    assert Radial(0.5) == Radial(decay=0.5)
    assert len({Diagonal(3), Diagonal(3), Stripe()}) == 2


def test_every_backend_refuses_queries_without_a_key() -> None:
    q, k, v = qkv()
    lonely = Stencil((1, 5, 6), ((1, 0, 0),))
    for backend in PLAIN:
        with pytest.raises(ValueError, match="leaves 30 of the 90 queries of grid 3x5x6 without"):
            sparse_attention(q, k, v, lonely, LAYOUT, backend=backend)


def test_a_union_may_cover_what_its_members_do_not() -> None:
    forward, back = Stencil((1, 5, 6), ((1, 0, 0),)), Stencil((1, 5, 6), ((-1, 0, 0),))
    assert Union(forward, back).density(TokenLayout(Grid(3, 5, 6))) == pytest.approx(4 / 9)


def test_a_layer_of_skipped_heads_has_gradients() -> None:
    for backend in PLAIN:
        q, k, v = (x.requires_grad_() for x in qkv())
        sparse_attention(q, k, v, Skip(), LAYOUT, backend=backend).sum().backward()
        assert q.grad is not None
        assert bool((q.grad == 0).all())


def test_batches_do_not_meet() -> None:
    q, k, v = qkv(batch=3)
    for pattern in (Radial(), Neighborhood((2, 3, 3))):
        whole = sparse_attention(q, k, v, pattern, LAYOUT)
        for item in range(3):
            own = sparse_attention(*(x[item : item + 1] for x in (q, k, v)), pattern, LAYOUT)
            torch.testing.assert_close(whole[item : item + 1], own, rtol=0, atol=1e-6)


def test_inputs_need_not_be_contiguous() -> None:
    q, k, v = qkv(dtype=torch.float64)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for backend in PLAIN:
        expected = sparse_attention(q, k, v, Stripe(), LAYOUT, backend=backend)
        out = sparse_attention(*turned, Stripe(), LAYOUT, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_merging_disjoint_keys_is_one_softmax() -> None:
    q, k, v = qkv(dtype=torch.float64)
    whole = sparse_attention(q, k, v, Dense(), LAYOUT, return_lse=True)
    parts = []
    for keys in (slice(0, 40), slice(40, 41), slice(41, None)):
        layout = TokenLayout(segments=[Segment("prefix", k[:, :, keys].shape[2])])
        parts.append(
            sparse_attention(
                q, k[:, :, keys], v[:, :, keys], Dense(), LAYOUT, kv_layout=layout, return_lse=True
            )
        )
    parts.append(sparse_attention(q, k, v, Skip(), LAYOUT, return_lse=True))
    merged = merge_attention([out for out, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-13)
    empty = merge_attention([parts[-1][0]] * 2, [parts[-1][1]] * 2)
    assert bool((empty[0] == 0).all()) and bool((empty[1] == -torch.inf).all())


def test_auto_says_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="visattn.attention"):
        sparse_attention(*qkv(), Dense(), LAYOUT)
    assert "blockwise" in caplog.text
    assert choose_backend("auto", qkv()[0]).backend == "blockwise"


Q, K, V = qkv(1, 2)
BAD_CALLS = {
    "q must be a tensor": lambda: sparse_attention(None, K, V, Dense(), LAYOUT),
    r"q of shape \[2, 101, 16\] must be \[B, H, L, D\]": lambda: sparse_attention(
        Q[0], K, V, Dense(), LAYOUT
    ),
    r"k of shape \[1, 2, 0, 16\] must be": lambda: sparse_attention(
        Q, K[:, :, :0], V, Dense(), LAYOUT
    ),
    "q of dtype torch.int64 must be": lambda: sparse_attention(Q.long(), K, V, Dense(), LAYOUT),
    "v of dtype torch.float16 must have the dtype of q": lambda: sparse_attention(
        Q, K, V.half(), Dense(), LAYOUT
    ),
    "k on meta must be on the device of q, cpu": lambda: sparse_attention(
        Q, K.to("meta"), V, Dense(), LAYOUT
    ),
    r"v is a tensor of layout torch.sparse_coo.* call to_dense\(\) first": lambda: sparse_attention(
        Q, K, V.to_sparse(), Dense(), LAYOUT
    ),
    "q is a nested tensor.* call to_padded_tensor": lambda: sparse_attention(
        torch.nested.nested_tensor([Q[0], Q[0, :, :3]]), K, V, Dense(), LAYOUT
    ),
    "q is batched by torch.vmap.* put that axis into the batch": lambda: torch.vmap(
        lambda x: sparse_attention(x, x, x, Dense(), LAYOUT)
    )(Q[None]),
    r"q is a meta tensor, which has no values for TopBlocks\(.* give a static pattern": lambda: (
        sparse_attention(*[Q.to("meta")] * 3, TopBlocks(0.5), LAYOUT)
    ),
    "v of shape .* must have the shape of k": lambda: sparse_attention(
        Q, K, V[..., :8], Dense(), LAYOUT
    ),
    "k of shape .* must have the batch and head size": lambda: sparse_attention(
        Q, K[..., :8], V[..., :8], Dense(), LAYOUT
    ),
    "q has 2 heads, which the 3 heads of k": lambda: sparse_attention(
        Q, K[:, [0, 1, 1]], V[:, [0, 1, 1]], Dense(), LAYOUT
    ),
    "q has 100 tokens but layout 3x5x6 .* has 101": lambda: sparse_attention(
        *(x[:, :, :100] for x in (Q, K, V)), Dense(), LAYOUT
    ),
    "k has 101 tokens but kv_layout 3x5x6 has 90": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, kv_layout=TokenLayout(Grid(3, 5, 6))
    ),
    "kv_layout has grid 1x1x101 where layout has 3x5x6": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, kv_layout=TokenLayout(Grid(1, 1, 101))
    ),
    "layout=None must be a TokenLayout": lambda: sparse_attention(Q, K, V, Dense(), None),
    "kv_layout=5 must be a TokenLayout or None": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, kv_layout=5
    ),
    "pattern='radial' must be a pattern": lambda: sparse_attention(Q, K, V, "radial", LAYOUT),
    "pattern holds 3; it takes patterns": lambda: sparse_attention(Q, K, V, [Dense(), 3], LAYOUT),
    "pattern holds 1 patterns; q has 2 heads": lambda: sparse_attention(Q, K, V, [Dense()], LAYOUT),
    "scale=nan must be a finite number": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, scale=float("nan")
    ),
    "scale='x' must be a finite number": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, scale="x"
    ),
    "backend='cudnn' must be one of auto": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, backend="cudnn"
    ),
    r"text_lengths of shape \[2\] must be \[1, 1\] or \[1\]": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, text_lengths=torch.tensor([3, 4])
    ),
    "text_lengths must be an int32 or int64 tensor, not torch.float32": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, text_lengths=torch.tensor([3.0])
    ),
    "text_lengths must be an int32 or int64 tensor, not list": lambda: sparse_attention(
        Q, K, V, Dense(), LAYOUT, text_lengths=[3]
    ),
    "text_lengths is given but the key layout": lambda: sparse_attention(
        Q, K, V, Dense(), TokenLayout(Grid(1, 1, 101)), text_lengths=torch.tensor([3])
    ),
    "outputs and lses hold 0 and 0": lambda: merge_attention([], []),
    "lses of shape": lambda: merge_attention([Q], [Q]),
}


@pytest.mark.parametrize("sentence", BAD_CALLS)
def test_bad_calls_get_one_sentence(sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        BAD_CALLS[sentence]()
    assert "\n" not in str(caught.value)


NAN, INF = float("nan"), float("inf")
VIDEO = TokenLayout(Grid(5, 8, 8))
BAD_PATTERNS = {
    "width=nan": lambda: Diagonal(NAN),
    "width=-1 must be at least 0": lambda: Diagonal(-1),
    "width='a' must be an int": lambda: Diagonal("a"),
    "width=True must be an int": lambda: Diagonal(True),
    "width=320 must be below the 320 tokens": lambda: Diagonal(320).lower(VIDEO),
    "decay=nan must be finite": lambda: Radial(NAN),
    "decay=inf must be finite": lambda: Radial(INF),
    "decay=0 must be finite and above 0": lambda: Radial(0),
    "decay='1' must be a number": lambda: Radial("1"),
    "sink=1 must be True or False": lambda: Radial(sink=1),
    "rule='blocks' must be": lambda: Radial(rule="blocks"),
    "block=16 must be at least 32": lambda: Radial(block=16),
    "window=0 must be at least 1": lambda: Neighborhood(0),
    "window=nan": lambda: Neighborhood((NAN, 3, 3)),
    "window=inf": lambda: Neighborhood(INF),
    "window=-0.5": lambda: Neighborhood(-0.5),
    r"window=\(\) must be one size or a tuple": lambda: Neighborhood(()),
    r"window=\(1, 2, 3, 4\) must be": lambda: Neighborhood((1, 2, 3, 4)),
    "window=6 is more than the 5 allowed on an axis of 5 frames": lambda: Neighborhood(
        (6, 3, 3)
    ).lower(VIDEO),
    r"window=\(3, 3\) has 2 values but grid": lambda: Neighborhood((3, 3)).lower(VIDEO),
    "dilation=3 is more than the 2 allowed": lambda: Neighborhood((1, 4, 4), 1, (1, 3, 1)).lower(
        VIDEO
    ),
    "stride=4 is more than the 3 allowed": lambda: Neighborhood(3, 4).lower(VIDEO),
    "stride=nan": lambda: Neighborhood(3, NAN),
    "dilation=0 must be": lambda: Neighborhood(3, 1, 0),
    "causal=1 must be True or False": lambda: Neighborhood(3, causal=1),
    r"causal=\(\) must be one flag": lambda: Neighborhood(3, causal=()),
    "tile=9 is more than the 8 allowed": lambda: SlidingTile((1, 9, 1), 1).lower(VIDEO),
    r"window=\(1, 3, 1\) is 3 tiles where grid 5x8x8 has 2": lambda: SlidingTile(
        4, (1, 3, 1)
    ).lower(VIDEO),
    "tile=nan": lambda: SlidingTile(NAN, 1),
    "size=nan": lambda: Block(NAN),
    "size=0 must be": lambda: Block((1, 0, 1)),
    "size=6 is more than": lambda: Block((6, 1, 1)).lower(VIDEO),
    "shift=4 is more than the 3 allowed": lambda: ShiftedBlock(4, (4, 0, 0)).lower(VIDEO),
    "shift=nan": lambda: ShiftedBlock(4, NAN),
    "count=0 must be at least 1": lambda: ShiftedBlock(4).for_layers(0),
    "size=9 is more than the 8": lambda: GridBlocks((1, 9, 1)).lower(VIDEO),
    "halo=-1 must be at least 0": lambda: Halo(4, -1),
    "halo=9 is more than": lambda: Halo(4, (0, 9, 0)).lower(VIDEO),
    "block=nan": lambda: Halo(NAN, 1),
    "local=0 must be at least 1": lambda: Sharded(0, 4),
    "stride=2.0 must be an integer": lambda: Sharded(1, 2.0),
    "shard=4 must be below stride=4": lambda: Sharded(1, 4, 4),
    "count=-1 must be at least 1": lambda: Sharded(1, 4).for_heads(-1),
    "columns=3 must be a tuple": lambda: Stripe(columns=3),
    "columns=nan": lambda: Stripe(columns=(NAN,)),
    "columns holds 1.5": lambda: Stripe(columns=(1.5,)),
    "columns holds 320; grid": lambda: Stripe(columns=(320,)).lower(VIDEO),
    r"columns holds the run \(9, 9\)": lambda: Stripe(columns=((9, 9),)).lower(VIDEO),
    r"columns holds \(\); a run": lambda: Stripe(columns=((),)),
    r"columns holds \(0.5,\); a run": lambda: Stripe(columns=((0.5,),)),
    r"columns holds \(1, 2, 3\)": lambda: Stripe(columns=((1, 2, 3),)),
    "first_frame=False with no columns": lambda: Stripe(False),
    "first_frame=0 must be True or False": lambda: Stripe(0),
    r"offsets=\(\) with columns=\(\) keeps no key": lambda: Stencil(4, ()),
    "offsets holds .* three integers": lambda: Stencil(4, ((0, 0),)),
    "offsets holds .*nan": lambda: Stencil(4, ((0, 0, NAN),)),
    "leaves 128 of the 320 queries of grid 5x8x8": lambda: Stencil(
        (1, 4, 4), ((2, 0, 0), (9, 9, 9))
    ).lower(VIDEO),
    "columns holds 20 but grid 5x8x8 has 20 tiles": lambda: Stencil(
        (1, 4, 4), ((0, 0, 0),), (20,)
    ).lower(VIDEO),
    "Union got 1 patterns": lambda: Union(Dense()),
    "Union got 'x'": lambda: Union(Dense(), "x"),
    "pattern=3 must be a pattern": lambda: __import__("visattn").patterns.AxisOrder(3),
    "order='abc' must hold": lambda: __import__("visattn").patterns.AxisOrder(Dense(), "abc"),
    "block_q=0 must be at least 1": lambda: Dense().lower(VIDEO, 0),
    "block_k=5000 must be at most 4096": lambda: Dense().lower(VIDEO, 64, 5000),
    "block_q=64.0 must be an integer": lambda: Dense().lower(VIDEO, 64.0),
    "block=32 cuts grid 64x512x512 into 524288 runs": lambda: Sharded(1, 2, block=32).lower(
        TokenLayout(Grid(64, 512, 512))
    ),
    "tile=2 must be three integers": lambda: BoxOrder(2),
    "tile=-1 must be at least 1": lambda: BoxOrder((-1, 2, 2)),
    "dilation=0 must be at least 1": lambda: BoxOrder((2, 2, 2), dilation=(0, 1, 1)),
    "partial='round' must be": lambda: Dense().lower(VIDEO, partial="round"),
    "leaves .* query blocks without any key": lambda: Diagonal(3).lower(
        VIDEO, 16, 16, partial="drop"
    ),
}


def test_huge_fractions_are_clamped() -> None:
    huge = [
        Diagonal(1e308),
        Neighborhood(1e308),
        Halo(4, 1e308),
        Radial(1e308),
        Radial(1e300, rule="token"),
        ShiftedBlock(4, 1e308),
    ]
    for pattern in huge:
        assert 0 < pattern.density(VIDEO) <= 1
        assert pattern.lower(VIDEO, 32, 32).num_visited > 0


@pytest.mark.parametrize("sentence", BAD_PATTERNS)
def test_bad_parameters_get_one_sentence(sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence) as caught:
        BAD_PATTERNS[sentence]()
    assert "\n" not in str(caught.value)


SMALL = [Diagonal(7), Neighborhood((1, 3, 3)), Radial(0.2, rule="token"), Stripe()]


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
def test_default_device_of_the_user_is_no_matter(backend):
    """Geometry is made on the CPU; on the default device it would be read back, value by value."""
    whole = backend != "triton"  # which is slow in the interpreter
    grid, patterns = (Grid(6, 8, 8), EXAMPLES.values()) if whole else (Grid(1, 5, 6), SMALL)
    layout = TokenLayout(grid, text_after=5)
    q, k, v = qkv(1, 1, layout.length)
    lengths = torch.tensor([3])
    for pattern in patterns:
        expected = sparse_attention(q, k, v, pattern, layout, backend=backend, text_lengths=lengths)
        density = pattern.density(layout)
        MAPS.clear()
        DEVICE_MAPS.clear()
        sequence_blocks.cache_clear()
        with torch.device("meta"):
            out = sparse_attention(q, k, v, pattern, layout, backend=backend, text_lengths=lengths)
            assert pattern.density(layout) == density
            assert isinstance(pattern.lower(layout, 16, 16).pairs(), int)
        assert torch.equal(out, expected), pattern
