"""Times of attention by a pattern, compared with dense attention and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention import choose_backend, sparse_attention
from visattn.attention.lowering import block_sizes, lower_cached
from visattn.bench.timing import Time, take_turns
from visattn.bench.video_shapes import Shape
from visattn.cost import Calibration, layer_cost
from visattn.geometry.layout import TokenLayout, valid_keys
from visattn.kernels.launch import launch_of
from visattn.patterns import Dense, Pattern

__all__ = ["AttentionTime", "WrongResult", "time_attention"]

DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ROWS = 64  # number of queries that are checked
Run = Callable[[], object]


class WrongResult(RuntimeError):
    """A result differs from the exact one by more than its dtype allows, so it is not timed.

    Example:
        >>> from visattn.bench import WrongResult
        >>> raise WrongResult("differs by 0.1, where 1e-6 is allowed")
        Traceback (most recent call last):
        visattn.bench.measure_attention.WrongResult: differs by 0.1, where 1e-6 is allowed
    """


@dataclass(frozen=True)
class AttentionTime:
    """Times of one call of attention, in seconds.

    Attributes:
        pattern: the pattern in written form.
        tokens: number of tokens.
        heads: number of heads.
        head_size: channels of a head.
        density: kept share of the (query, key) pairs.
        executed: executed share of the blocks.
        dense: time of the fastest dense attention.
        all_dense: times of all dense attentions that ran, by name.
        sparse: time of ``sparse_attention``, including its permutations of tokens.
        own_dense: time of ``sparse_attention`` with the pattern ``dense()``.
        flex: time of FlexAttention with the same block map, or None.
        predicted: time of ``sparse_attention`` that the cost model predicts, or None.
        efficiency: dense time x density / sparse time.
        tflops: floating-point operations of the kept pairs per second of ``sparse``, in 10^12.
        peak: bytes that ``sparse_attention`` allocates besides its arguments and its result; None
            unless on a GPU.
        missing: the reasons why something did not run, by name.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.bench import Shape, time_attention
        >>> from visattn.patterns import Diagonal
        >>> shape = Shape(TokenLayout(Grid(2, 8, 8)), heads=1, head_size=16)
        >>> time = time_attention(Diagonal(8), shape, repeats=1, flex=False)
        >>> time.tokens, time.sparse.median > 0
        (128, True)
    """

    pattern: str
    tokens: int
    heads: int
    head_size: int
    density: float
    executed: float
    dense: Time
    all_dense: dict[str, Time]
    sparse: Time
    own_dense: Time
    flex: Time | None
    predicted: float | None
    efficiency: Time
    tflops: float
    peak: int | None
    missing: dict[str, str]

    def numbers(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@torch.no_grad()
def time_attention(
    pattern: Pattern,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 7,
    flex: bool = True,
    calibration: Calibration | None = None,
) -> AttentionTime:
    """Time attention by a pattern, dense attention and FlexAttention in turn.

    First, the result of some queries is compared with exact attention.

    Args:
        pattern: the static pattern.
        shape: tokens, heads and head size.
        dtype: dtype of queries, keys and values.
        device: the device that computes.
        repeats: number of timed rounds.
        flex: whether to time FlexAttention.
        calibration: calibration of the device, which predicts the time; without it there is no
            prediction.

    Returns:
        The times.

    Raises:
        WrongResult: the sparse result is wrong.

    Example:
        >>> from visattn import Grid, TokenLayout
        >>> from visattn.bench import Shape, time_attention
        >>> from visattn.patterns import Diagonal
        >>> shape = Shape(TokenLayout(Grid(2, 8, 8)), heads=1, head_size=16)
        >>> time = time_attention(Diagonal(8), shape, repeats=1, flex=False)
        >>> round(time.density, 2)
        0.13
    """
    device = torch.device(device)
    layout, heads, dim = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, layout.length, dim, generator=generator, device=device).to(dtype)
        for _ in range(3)
    )
    sparse = functools.partial(sparse_attention, q, k, v, pattern, layout)
    check(sparse(), q, k, v, pattern, layout)
    missing: dict[str, str] = {}
    runs: dict[str, Run] = dense_runs(q, k, v, missing)
    runs["sparse"] = sparse
    runs["own dense"] = functools.partial(sparse_attention, q, k, v, Dense(), layout)
    if flex:
        run = flex_run(q, k, v, pattern, layout, missing)
        if run is not None:
            runs["flex"] = run
    times = dict(zip(runs, take_turns(list(runs.values()), repeats, device), strict=True))
    all_dense = {name.removeprefix("dense "): x for name, x in times.items() if "dense " in name}
    fastest = min(all_dense.values(), key=lambda x: x.median)
    density = pattern.density(layout)
    ratios = [
        a * density / b for a, b in zip(fastest.samples, times["sparse"].samples, strict=True)
    ]
    return AttentionTime(
        pattern=str(pattern),
        tokens=layout.length,
        heads=heads,
        head_size=dim,
        density=density,
        executed=executed_share(pattern, layout, q),
        dense=fastest,
        all_dense=all_dense,
        sparse=times["sparse"],
        own_dense=times["own dense"],
        flex=times.get("flex"),
        predicted=(
            layer_cost([pattern] * heads, layout, calibration).seconds if calibration else None
        ),
        efficiency=Time.of(ratios),
        tflops=4 * density * layout.length**2 * dim * heads / times["sparse"].median / 1e12,
        peak=peak_bytes(sparse, device),
        missing=missing,
    )


def executed_share(pattern: Pattern, layout: TokenLayout, q: torch.Tensor) -> float:
    """Return the share of blocks that the backend of this device executes."""
    backend = choose_backend("auto", q).backend
    sizes = launch_of(q)[:2] if backend == "triton" else block_sizes(layout.length)
    return lower_cached(pattern, layout, None, *sizes).block_density


def check(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
    text_lengths: torch.Tensor | None = None,
) -> None:
    """Compare the output of some queries with exact attention in float64.

    The bound is ``max|out - exact| <= 1.5 max|eager - exact| + 1 ulp``, where ``eager`` are the
    same products in the dtype of ``q``.

    Args:
        out: the output to check, ``[1, H, L, D]``.
        q: queries ``[1, H, L, D]``.
        k: keys ``[1, H, L, D]``.
        v: values ``[1, H, L, D]``.
        pattern: the static pattern of all heads.
        layout: the layout of the tokens.
        text_lengths: valid text tokens, int64 ``[1, texts]``, or None if all are valid.

    Raises:
        WrongResult: the bound is exceeded.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(layout.length, generator=generator)[:ROWS]
    kept = pattern.allows(rows[:, None], torch.arange(layout.length), layout).to(q.device)
    if text_lengths is not None:
        kept = kept & valid_keys(text_lengths, layout)[0]
    scale = q.shape[3] ** -0.5
    worst: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    largest = torch.zeros((), device=q.device)
    for head in range(q.shape[1]):
        queries, keys, values = q[0, head, rows.to(q.device)], k[0, head], v[0, head]
        exact = _attend(queries.double(), keys.double(), values.double(), kept, scale)
        worst.append((out[0, head, rows.to(q.device)] - exact).abs().max())
        plain.append((_attend(queries, keys, values, kept, scale) - exact).abs().max())
        largest = torch.maximum(largest, exact.abs().max().float())
    error, bound = float(max(worst)), 1.5 * float(max(plain))
    bound += torch.finfo(q.dtype).eps * float(largest)
    if not error <= bound:
        raise WrongResult(
            f"{pattern} at {layout} differs from exact attention by {error:.2e}, where {bound:.2e} "
            "is allowed; it is not timed"
        )


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    acc_dtype = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(acc_dtype) @ k.to(acc_dtype).mT * scale
    return logits.masked_fill(~kept, -torch.inf).softmax(-1).to(v.dtype) @ v


def dense_runs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, missing: dict[str, str]
) -> dict[str, Run]:
    """Return the dense attentions that run on the device; ``missing`` gets the reasons of
    others."""
    if q.device.type != "cuda":
        return {"dense sdpa": functools.partial(scaled_dot_product_attention, q, k, v)}
    runs: dict[str, Run] = {}
    for name, backend in DENSE.items():

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        try:
            run()
        except RuntimeError as error:
            missing[name] = str(error).splitlines()[0]
            continue
        runs[f"dense {name}"] = run
    return runs


def flex_run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    layout: TokenLayout,
    missing: dict[str, str],
) -> Run | None:
    """Return compiled FlexAttention with the same pattern in raster order and blocks of 128, or
    None, with the reason in ``missing``."""
    from torch.nn.attention.flex_attention import flex_attention

    from visattn.flex import to_block_mask
    from visattn.geometry.orders import LineOrder

    try:
        block_map = pattern.lower(layout, 128, 128, order=LineOrder())
        mask = to_block_mask(block_map, q.device)
        compiled = torch.compile(flex_attention)
        compiled(q, k, v, block_mask=mask)
    except Exception as error:  # compilation raises errors of many types
        missing["flex"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
    return functools.partial(compiled, q, k, v, block_mask=mask)


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """Return the bytes that a call allocates at most, without its result; None unless on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = run()
    assert isinstance(out, torch.Tensor)
    result_bytes = out.numel() * out.element_size()
    return int(torch.cuda.max_memory_allocated(device)) - before - result_bytes
