"""What a caller sets for all of torch changes nothing of what patterns compute: autocast, inference
mode, the default device."""

from __future__ import annotations

import gc

import pytest
import torch
from support.caches import clear_caches, live_tensors
from support.cases import EXAMPLES
from support.selectors_oracle import SMALL

from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention import AttentionSpec, attention_by
from visattn.attention.dense_attention import dense_with_lse
from visattn.guidance.edits.map_columns import token_columns
from visattn.patterns import HeadPattern, Pattern, parse_pattern
from visattn.readout import Measures, attention_rows, default_tilings, draw_rows
from visattn.selectors import Memory
from visattn.selectors.audit import audit

LAYOUT = TokenLayout(Grid(6, 8, 8), text_after=7)  # on which the examples are legal
SMALLER = TokenLayout(Grid(3, 5, 6), text_after=7)  # of dynamic patterns
EVERY: dict[str, HeadPattern] = {
    **EXAMPLES,
    **{name: parse_pattern(text) for name, text in SMALL.items()},
    "agent": parse_pattern("agent((1, 2, 2))"),
    "guarded": parse_pattern("reuse(vsa(0.3, (2, 2, 2)), 3, guard=0.01, drift=0.5)"),
    "mixed": parse_pattern("top_blocks(0.3, block=8, rest='pooled', mass=0.4)"),
}
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


def layout_of(pattern: HeadPattern) -> TokenLayout:
    return LAYOUT if isinstance(pattern, Pattern) else SMALLER


def tensors(
    dtype: torch.dtype = torch.bfloat16, layout: TokenLayout = LAYOUT
) -> list[torch.Tensor]:
    """q, k, v of two samples and two heads, whose values bfloat16 has."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (2, 2, layout.length, 8)
    made = [2 * torch.randn(shape, generator=generator, device="cpu") for _ in range(3)]
    return [x.bfloat16().to(dtype) for x in made]


def two_steps(pattern: HeadPattern, dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs of two steps of a generation, of which the second knows the first."""
    memory, found, layout = Memory(), [], layout_of(pattern)
    with torch.no_grad():
        for step in range(2):
            memory.begin(step, 3)
            spec = AttentionSpec((pattern,) * 2, layout, backend="blockwise")
            out, _ = attention_by(*tensors(dtype, layout), spec, memory)
            found.append(out)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_autocast_casts_inputs_and_nothing_else(dtype: torch.dtype) -> None:
    for name, pattern in EVERY.items():
        expected = two_steps(pattern, torch.bfloat16)
        with AUTOCAST:
            found = two_steps(pattern, dtype)
            assert torch.is_autocast_enabled("cpu")
        for own, other in zip(found, expected, strict=True):
            assert own.dtype == torch.bfloat16 and torch.equal(own, other), name


def test_autocast_leaves_float64_and_refuses_a_mixture_with_it() -> None:
    q, k, v = tensors(torch.float64)
    pattern = EVERY["pyramid"]
    expected = sparse_attention(q, k, v, pattern, LAYOUT, return_lse=True)
    with AUTOCAST:
        found = sparse_attention(q, k, v, pattern, LAYOUT, return_lse=True)
        with pytest.raises(TypeError, match="must have the dtype of q"):
            sparse_attention(q, k, v.float(), pattern, LAYOUT)
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_tensors_of_several_dtypes_are_cast_alike(backend: str) -> None:
    """HunyuanVideo's rotary embedding gives float32 queries and keys beside bfloat16 values."""
    q, k, v = tensors()
    pattern = EVERY["diagonal"]
    expected = sparse_attention(q, k, v, pattern, LAYOUT, backend=backend, return_lse=True)
    with AUTOCAST:
        found = sparse_attention(
            q.float(), k.float(), v, pattern, LAYOUT, backend=backend, return_lse=True
        )
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


def gradients(
    pattern: HeadPattern, dtype: torch.dtype = torch.bfloat16, autocast: bool = False
) -> list[torch.Tensor]:
    """Of q, k and v; of Skip those of k and v are 0."""
    layout = layout_of(pattern)
    given = [x.requires_grad_() for x in tensors(dtype, layout)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = sparse_attention(*given, pattern, layout, backend="blockwise")
    loss = out.float().square().mean()
    found = torch.autograd.grad(loss, given, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]


def test_gradients_of_mixed_precision() -> None:
    """With the forward under autocast, as mixed precision trains."""
    for name, pattern in EVERY.items():
        expected = gradients(pattern)
        found = gradients(pattern, torch.float32, autocast=True)
        for own, other in zip(found, expected, strict=True):
            assert own.dtype == torch.float32 and torch.equal(own.bfloat16(), other), name


def test_compiled_calls_are_cast() -> None:
    q, k, v = tensors()
    pattern = EVERY["neighborhood"]
    expected = sparse_attention(q, k, v, pattern, LAYOUT)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, k, v, pattern, LAYOUT)

    with AUTOCAST:
        found = run(q.float(), k.float(), v)
    assert torch.equal(found, expected)


def test_what_reads_attention_computes_in_float32() -> None:
    """The readout, the audit and the columns of tokens, called under autocast by themselves."""
    q, k, v = tensors()
    sample = draw_rows(LAYOUT, default_tilings(Grid(6, 8, 8), 16), tiles=3)

    def read() -> list[torch.Tensor]:
        out, lse = sparse_attention(q, k, v, EVERY["radial"], LAYOUT, return_lse=True)
        found = audit(q, k, v, out, lse, LAYOUT, None, 0.3, 9)
        measures = Measures(sample)
        tally = measures(attention_rows(q[0], k[0], sample.tokens), 2)
        whole, whole_lse = dense_with_lse(q, k, v, 0.3)
        own = q.clone().requires_grad_()
        keys, heads = torch.tensor([3, 9]), torch.tensor([0.4, 0.6])
        columns = token_columns(own, k, keys, torch.eye(2), heads, 0.3)
        (slope,) = torch.autograd.grad(columns.square().sum(), own)
        wide, _ = dense_with_lse(own, k, v, 0.3)  # in plain torch, as it has a gradient
        return [
            *(out, lse, found.error, found.dropped, whole, whole_lse, columns, slope, wide),
            *(measures.reach, *tally.tensors()),
        ]

    expected = read()
    with AUTOCAST:
        found = read()
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert all(torch.equal(own, other) for own, other in zip(found, expected, strict=True))


def inference_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in live_tensors() if x.is_inference()]


@pytest.fixture
def fresh() -> None:
    """Nothing is cached yet."""
    clear_caches()


@pytest.mark.usefixtures("fresh")
def test_nothing_that_is_kept_is_an_inference_tensor() -> None:
    before = {id(x) for x in inference_tensors()}
    with torch.inference_mode():
        for pattern in EVERY.values():
            two_steps(pattern, torch.float32)
        for pattern in EXAMPLES.values():
            sparse_attention(*tensors(), pattern, LAYOUT, backend="reference")
    kept = [list(x.shape) for x in inference_tensors() if id(x) not in before]
    assert kept == []
    for pattern in EVERY.values():
        two_steps(pattern, torch.float32)  # writes to memory that is used again
        gradients(pattern)


@pytest.mark.usefixtures("fresh")
def test_default_device_is_not_that_of_a_call() -> None:
    torch.set_default_device("meta")
    try:
        found = {
            name: [*two_steps(pattern, torch.float32), *gradients(pattern)]
            for name, pattern in EVERY.items()
        }
        fixed = {
            name: sparse_attention(*tensors(), pattern, LAYOUT, backend="reference")
            for name, pattern in EXAMPLES.items()
        }
        rows = draw_rows(LAYOUT, default_tilings(Grid(6, 8, 8), 16), tiles=3).tokens
    finally:
        torch.set_default_device(None)
    for name, pattern in EVERY.items():
        expected = [*two_steps(pattern, torch.float32), *gradients(pattern)]
        for own, other in zip(found[name], expected, strict=True):
            assert own.device.type == "cpu" and torch.equal(own, other), name
    for name, own in fixed.items():
        other = sparse_attention(*tensors(), EXAMPLES[name], LAYOUT, backend="reference")
        assert torch.equal(own, other), name
    assert rows.device.type == "cpu"
