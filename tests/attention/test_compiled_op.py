"""``torch.compile`` and gradients."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from visattn import Grid, TokenLayout, patterns, sparse_attention
from visattn.attention import BackendUnavailable
from visattn.attention.backends.blockwise import blockwise_backward
from visattn.attention.compiled_op import attention_op, register
from visattn.attention.spec import AttentionSpec
from visattn.patterns import (
    AxisOrder,
    Dense,
    Diagonal,
    Neighborhood,
    Pattern,
    Radial,
    Skip,
    Stripe,
    Union,
)

LAYOUT = TokenLayout(Grid(2, 3, 4), text_after=5)
HEADS: list[Pattern] = [Radial(rule="token"), Neighborhood((2, 3, 3))]
LENGTHS = torch.tensor([5, 2])


def qkv(dtype: torch.dtype = torch.float32, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, LAYOUT.length, 8)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)
    ]


class Counter:
    """A compiler backend that counts graphs and runs them as aot_eager does."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "triton", "blockwise", "reference"])
def test_compiled_call_is_one_graph_and_bit_equal(backend: str) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
        return sparse_attention(
            q * 2, k, v, HEADS, LAYOUT, text_lengths=LENGTHS, backend=backend, return_lse=True
        )

    counter = Counter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*qkv()), call(*qkv()), rtol=0, atol=0)
    assert counter.graphs == 1


@pytest.mark.second
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_is_within_the_bound() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q.sin(), k.cos(), v, HEADS, LAYOUT) + 1

    with torch.no_grad():
        out = torch.compile(call, fullgraph=True)(*qkv())
        exact = call(*[x.double() for x in qkv()])
        eager = call(*qkv())
    error, allowed = (out - exact).abs().max(), (eager - exact).abs().max()
    assert error <= 1.5 * allowed + torch.finfo(torch.float32).eps * exact.abs().max()


def test_changing_and_removing_the_pattern_is_seen() -> None:
    state: dict[str, Pattern | None] = {"pattern": Diagonal(2)}

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pattern = state["pattern"]
        if pattern is None:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return sparse_attention(q, k, v, pattern, LAYOUT)

    counter = Counter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    with torch.no_grad():
        for pattern in (Diagonal(2), Stripe(), AxisOrder(Diagonal(2), "hwt"), None, Diagonal(2)):
            state["pattern"] = pattern
            assert torch.equal(compiled(*qkv()), call(*qkv())), pattern


def test_the_pattern_may_be_an_argument_or_several() -> None:
    compiled = torch.compile(sparse_attention, fullgraph=True, backend="aot_eager")
    choices: list[Pattern | list[Pattern]] = [
        Union(Diagonal(2), Stripe()),
        [Dense(), Skip()],
        patterns.Block((1, 3, 2)),
    ]
    with torch.no_grad():
        for choice in choices:
            expected = sparse_attention(*qkv(), choice, LAYOUT)
            assert torch.equal(compiled(*qkv(), choice, LAYOUT), expected)


def test_bad_input_of_a_compiled_call_is_named() -> None:
    layout = TokenLayout(Grid(1, 1, 9))
    compiled = torch.compile(
        lambda q, k, v: sparse_attention(q, k, v, HEADS, layout), backend="aot_eager"
    )
    with torch.no_grad(), pytest.raises(ValueError, match="q has 29 tokens but layout 1x1x9 has 9"):
        compiled(*qkv())


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_gradcheck(backend: str, with_lse: bool) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
        return sparse_attention(
            q,
            k,
            v,
            [Neighborhood((1, 3, 2)), Union(Diagonal(3), Stripe())],
            LAYOUT,
            text_lengths=LENGTHS,
            backend=backend,
            return_lse=with_lse,
        )

    assert torch.autograd.gradcheck(call, qkv(torch.float64, grad=True), fast_mode=True)


def test_rows_without_a_key_have_zero_gradients() -> None:
    for backend in ("blockwise", "reference"):
        q, k, v = qkv(torch.float64, grad=True)
        sparse_attention(q, k, v, [Skip(), Dense()], LAYOUT, backend=backend).sum().backward()
        for x in (q, k, v):
            assert x.grad is not None
            assert bool((x.grad[:, 0] == 0).all())
            assert bool(x.grad.isfinite().all())


@pytest.mark.second
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_the_kernels(compiled: bool) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> torch.Tensor:
        out, lse = sparse_attention(
            q, k, v, HEADS, LAYOUT, text_lengths=LENGTHS, backend=backend, return_lse=True
        )
        return (out * out).sum() + lse.sin().sum()

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    own, expected = qkv(grad=True), qkv(torch.float64, grad=True)
    run(*own, "triton").backward()
    call(*expected, "reference").backward()
    for x, y in zip(own, expected, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_lse", [False, True])
def test_blockwise_backward_is_autograds(with_lse: bool) -> None:
    """The written-out gradients, with grouped heads, reordered keys and text lengths."""
    heads: list[Pattern] = [
        Neighborhood((2, 3, 3)),
        Diagonal(4),
        Skip(),
        AxisOrder(Stripe(), "wht"),
    ]
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, n, LAYOUT.length, 8) for n in (4, 2, 2)]
    q, k, v = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    out, lse = sparse_attention(
        q, k, v, heads, LAYOUT, text_lengths=LENGTHS, backend="reference", return_lse=True
    )
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64)
    grad_lse[:, 2] = 0  # a skipped head has no LSE to differentiate
    loss = (out * grad_out).sum()
    if with_lse:
        loss = loss + (lse.nan_to_num(neginf=0) * grad_lse).sum()
    expected = torch.autograd.grad(loss, (q, k, v))
    spec = AttentionSpec(tuple(heads), LAYOUT, text_lengths=LENGTHS[:, None], scale=8**-0.5)
    found = blockwise_backward(
        q.detach(),
        k.detach(),
        v.detach(),
        out.detach(),
        lse.detach(),
        grad_out,
        grad_lse if with_lse else None,
        spec,
        block=(7, 5),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_opcheck() -> None:
    handle = register(AttentionSpec(tuple(HEADS), LAYOUT, backend="blockwise"))
    for grad in (False, True):  # gradients need the LSE
        torch.library.opcheck(
            attention_op, (*qkv(grad=grad), handle, LENGTHS, 0.3, grad), atol=1e-5, rtol=1e-5
        )


@pytest.mark.second
def test_triton_without_a_gpu_raises_and_auto_does_not() -> None:
    code = (
        "import torch\n"
        "from visattn import Grid, TokenLayout, sparse_attention\n"
        "from visattn.attention import BackendUnavailable\n"
        "from visattn.patterns import Dense\n"
        "x = torch.ones(1, 1, 4, 16)\n"
        "layout = TokenLayout(Grid(1, 2, 2))\n"
        "sparse_attention(x, x, x, Dense(), layout)\n"
        "try:\n"
        "    sparse_attention(x, x, x, Dense(), layout, backend='triton')\n"
        "except BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    if torch.cuda.is_available():
        code = "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n" + code
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in __import__("os").environ.items() if k != "TRITON_INTERPRET"},
    )
    assert run.stdout == (
        "backend='triton' cannot run: it needs a CUDA or ROCm GPU, and q is on cpu; "
        "use backend='blockwise'\n"
    )


def test_triton_refuses_what_it_does_not_compute() -> None:
    x = torch.ones(1, 1, 29, 8, dtype=torch.float64)
    with pytest.raises(
        BackendUnavailable, match=r"and q is torch.float64; use backend='blockwise'"
    ):
        sparse_attention(x, x, x, Dense(), LAYOUT, backend="triton")
    x = torch.ones(1, 1, 29, 257)
    with pytest.raises(BackendUnavailable, match="its head size is at most 256, and q has 257"):
        sparse_attention(x, x, x, Dense(), LAYOUT, backend="triton")
