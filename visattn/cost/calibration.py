"""The rates of a device for each kind of work, from eight short measurements."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.attention import choose_backend, sparse_attention
from visattn.attention.lowering import block_sizes, lower_cached
from visattn.cost.clock import Timing, interleaved
from visattn.cost.work import Work, work_of
from visattn.geometry.layout import Grid, TokenLayout
from visattn.kernels.launch import launch_of
from visattn.patterns import Diagonal, Neighborhood, Pattern

__all__ = ["TORCH", "Calibration", "DenseAttention", "calibrate", "device_name"]

HEADS = 4
TOKENS = {"cpu": 4096, "cuda": 16384}
DENSE_QUERIES = {"cpu": 512, "cuda": 16384}  # on a CPU few, so that a slice has its usual length
SWEEPS = 2000


class DenseAttention(NamedTuple):
    """The dense attention of a pipeline, with which sparse attention is compared.

    Attributes:
        name: of its attention backend in diffusers.
        run: returns the output for q, k and v, each ``[B, H, L, D]``.

    Example:
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> from visattn.cost import DenseAttention
        >>> DenseAttention("native", scaled_dot_product_attention).name
        'native'
    """

    name: str
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


TORCH = DenseAttention("native", _by_torch)


@dataclass(frozen=True)
class Calibration:
    """The seconds that a device takes for parts of attention of one dtype and head size.

    Attributes:
        device: name of the device.
        backend: ``"triton"`` or ``"blockwise"``.
        dtype: name of the torch dtype.
        head_size: D.
        block: queries and keys of the blocks that are counted.
        slots: rows of blocks that run at the same time.
        launch: seconds of a call, independent of its work.
        row: seconds of a row of blocks.
        full: seconds of a block without a mask.
        partial: seconds of a block with a mask.
        broad: as full, in rows of 192 and more queries on a CPU.
        moved: seconds of an element that is copied.
        dense: seconds of a (query, key) pair of one head in the pipeline's dense attention.
        dense_by: the attention backend of the dense attention.
        spread: the largest ``Timing.spread`` of the measurements; large on a busy machine.

    Example:
        >>> from visattn.cost import Calibration
        >>> calibration = Calibration(
        ...     device="CPU", backend="blockwise", dtype="float32", head_size=64, block=(128, 128),
        ...     slots=1, launch=1e-4, row=1e-6, full=4e-5, partial=5e-5, broad=4e-5, moved=1e-9,
        ...     dense=2e-9,
        ... )
        >>> calibration.dense_by
        'native'
    """

    device: str
    backend: str
    dtype: str
    head_size: int
    block: tuple[int, int]
    slots: int
    launch: float
    row: float
    full: float
    partial: float
    broad: float
    moved: float
    dense: float
    dense_by: str = TORCH.name
    spread: float = 0.0


Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Timing]]


@torch.no_grad()
def calibrate(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    *,
    dense_attention: DenseAttention = TORCH,
    seconds: float = 2.0,
    timer: Timer | None = None,
) -> Calibration:
    """Measure the rates of a device.

    Args:
        device: a CPU, or a GPU that the kernels support.
        dtype: float32; on a GPU also float16 or bfloat16.
        head_size: D.
        dense_attention: with which sparse attention is compared.
        seconds: approximate time for all measurements; each runs at least three rounds.
        timer: returns the timing of each function by name, for tests (default ``interleaved``).

    Example:
        >>> from visattn.cost import calibrate
        >>> calibrate("cpu", seconds=1.0).backend  # doctest: +SKIP
        'blockwise'
    """
    device = torch.device(device)
    tokens = TOKENS["cuda" if device.type == "cuda" else "cpu"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, HEADS, tokens, head_size, generator=generator).to(device, dtype)
        for _ in range(3)
    )
    backend = choose_backend("auto", q).backend
    block = launch_of(q)[:2] if backend == "triton" else block_sizes(tokens)
    gpu = device.type == "cuda"
    slots = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1
    queries = q[:, :, : DENSE_QUERIES["cuda" if gpu else "cpu"]].contiguous()
    functions: dict[str, Callable[[], object]] = {
        "dense": lambda: dense_attention.run(queries, k, v)
    }
    works: list[Work] = []
    for name, make in CASES.items():
        layout, pattern = make(tokens, max(block))
        functions[name] = _call(pattern, layout, *(x[:, :, : layout.length] for x in (q, k, v)))
        block_map = lower_cached(pattern, layout, None, *block)
        works.append(work_of(block_map, backend, HEADS, head_size))
    timings = timer(functions) if timer else interleaved(functions, device, seconds)
    dense = timings["dense"].seconds / (HEADS * queries.shape[2] * tokens)
    block_dense = dense * block[0] * block[1] * slots
    times = [slots * timings[name].seconds for name in CASES]
    counts = [(slots, w.rows, w.full, w.partial, w.broad, slots * w.moved) for w in works]
    least = [0.0, 0.0, *[0.5 * block_dense] * 3, 0.0]
    launch, row, full, partial, broad, moved = fit(times, counts, least)
    if not any(work.broad for work in works):
        broad = full
    return Calibration(
        device=device_name(device),
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        head_size=head_size,
        block=(block[0], block[1]),
        slots=slots,
        launch=launch,
        row=row,
        full=full,
        partial=partial,
        broad=broad,
        moved=moved,
        dense=dense,
        dense_by=dense_attention.name,
        spread=max(timing.spread for timing in timings.values()),
    )


def _call(
    pattern: Pattern, layout: TokenLayout, *tensors: torch.Tensor
) -> Callable[[], torch.Tensor]:
    q, k, v = (x.contiguous() for x in tensors)
    return lambda: sparse_attention(q, k, v, pattern, layout)


def fit(
    times: Sequence[float], counts: Sequence[Sequence[float]], least: Sequence[float]
) -> list[float]:
    """Return the rates that minimise the relative errors of ``counts @ rates``, by coordinate
    descent.

    Args:
        times: measured seconds.
        counts: the work of each measurement, one count for each rate.
        least: lower bounds of the rates.
    """
    weights = torch.tensor([1 / max(x, 1e-9) for x in times], dtype=torch.float64)
    matrix = torch.tensor(counts, dtype=torch.float64) * weights[:, None]
    sizes = matrix.norm(dim=0).clamp(min=1e-300)
    matrix = matrix / sizes
    floor = torch.tensor(least, dtype=torch.float64) * sizes
    squares, target = matrix.mT @ matrix, matrix.sum(0)  # every weighted time is 1
    rates = floor.clone()
    for _ in range(SWEEPS):
        for n in range(len(rates)):
            if float(squares[n, n]) > 0:
                rest = target[n] - squares[n] @ rates + squares[n, n] * rates[n]
                rates[n] = torch.maximum(floor[n], rest / squares[n, n])
    return [float(x) for x in rates / sizes]


def _line(tokens: int) -> TokenLayout:
    return TokenLayout(Grid(1, 1, tokens))


def _runs(tokens: int, block: int, blocks: int, stride: int = 1) -> tuple[TokenLayout, Pattern]:
    """Return a pattern with runs of whole blocks of keys around runs of queries."""
    run = stride * block
    return _line(tokens), Neighborhood((1, 1, run + 2 * blocks * block), stride=(1, 1, run))


def _cubes(tokens: int, block: int) -> tuple[TokenLayout, Pattern]:
    side = round(tokens ** (1 / 3)) // 8 * 8
    grid = Grid(tokens // side**2, side, side)
    return TokenLayout(grid), Neighborhood((8, 8, 8), stride=8)


# The measurements, by number of tokens and the larger side of a block.
CASES: dict[str, Callable[[int, int], tuple[TokenLayout, Pattern]]] = {
    "launch": lambda tokens, block: (_line(block), Diagonal(0)),
    "short": lambda tokens, block: _runs(tokens, block, 1),
    "long": lambda tokens, block: _runs(tokens, block, 6),
    "steps": lambda tokens, block: (_line(8 * block), Neighborhood(1.0, causal=True)),
    "masked": lambda tokens, block: (_line(tokens), Diagonal(block)),
    "broad": lambda tokens, block: _runs(tokens, block, 2, stride=4),
    "ordered": _cubes,
}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the model of a CPU with torch's number of threads.

    Args:
        device: of torch.

    Example:
        >>> import torch
        >>> from visattn.cost import device_name
        >>> device_name(torch.device("cpu"))  # doctest: +SKIP
        'AMD EPYC 9654 96-Core Processor, 2 threads'
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """Return the model of the CPU, or its architecture where the system does not name the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, (*models, platform.processor(), platform.machine())))
