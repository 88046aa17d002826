"""What a device takes for each kind of work: eight short measurements, kept in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn._version import __version__
from visattn.attention import choose_backend, sparse_attention
from visattn.cost.work import Work, work_of
from visattn.execute import block_sizes, lower_cached
from visattn.files import write_whole
from visattn.launch import launch_of
from visattn.layout import Grid, TokenLayout
from visattn.patterns import Diagonal, Neighborhood, Pattern

__all__ = ["Calibration", "calibrate", "calibration_of", "device_name"]

logger = logging.getLogger(__name__)

HEADS = 4
TOKENS = {"cpu": 4096, "cuda": 16384}
SWEEPS = 2000
LEAST = 3  # times that each is measured, at least
_FOUND: dict[str, Calibration] = {}


@dataclass(frozen=True)
class Calibration:
    """Seconds of a device for attention of a dtype and head size.

    Attributes:
        device: its name; backend: ``"triton"`` or ``"blockwise"``.
        dtype: as torch calls it; head_size: D.
        block: queries and keys of the blocks that are counted; slots: rows at a time.
        launch: of a call, whatever it does; row: of a row of blocks; full, partial: of a block
            without and with a mask, ``slots`` of which run at a time; broad: as full, in rows of
            192 queries and more on a CPU.
        moved: of an element that is copied; dense: of a query and key of one head in torch's
            dense attention.
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


Timer = Callable[[str, Callable[[], object]], float]


def calibration_of(
    device: torch.device | str, dtype: torch.dtype = torch.float32, head_size: int = 64
) -> Calibration:
    """The calibration of a device, measured once for each device, thread count, dtype, head size
    and version of visattn, torch and triton (about two seconds), and then read from
    ``$VISATTN_CACHE``, by default ``~/.cache/visattn``. A file that cannot be read is measured
    again; one that cannot be written is said once and does no harm.
    """
    device = torch.device(device)
    key = _key(device, dtype, head_size)
    if key not in _FOUND:
        path = _folder() / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        found = _read(path, key)
        if found is None:
            logger.info("visattn: measuring %s once, about two seconds", device_name(device))
            found = calibrate(device, dtype, head_size)
            _write(path, key, found)
        _FOUND[key] = found
    return _FOUND[key]


@torch.no_grad()
def calibrate(
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_size: int = 64,
    *,
    seconds: float = 2.0,
    timer: Timer | None = None,
) -> Calibration:
    """Measure a device.

    Args:
        device: a CPU, or a GPU that the kernels run on.
        dtype: float32, or on a GPU float16 or bfloat16 too; head_size: D.
        seconds: to measure for, about; each measurement runs three times at least.
        timer: gives the seconds of a named measurement, for tests; default: the least of several.
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
    clock = timer or _clock(device, seconds / (1 + len(CASES)))

    def case(name: str) -> tuple[float, Work]:
        layout, pattern = CASES[name](tokens, max(block))
        own = (x[:, :, : layout.length] for x in (q, k, v))
        a, b, c = (x.contiguous() for x in own)
        work = work_of(lower_cached(pattern, layout, None, *block), backend, HEADS, head_size)
        return clock(name, lambda: sparse_attention(a, b, c, pattern, layout)), work

    dense = clock("dense", lambda: scaled_dot_product_attention(q, k, v)) / (HEADS * tokens**2)
    block_dense = dense * block[0] * block[1] * slots
    found = [case(name) for name in CASES]
    times = [slots * x for x, _ in found]
    counts = [(slots, w.rows, w.full, w.partial, w.broad, slots * w.moved) for _, w in found]
    least = [0.0, 0.0, *[0.5 * block_dense] * 3, 0.0]
    launch, row, full, partial, broad, moved = fit(times, counts, least)
    if not any(work.broad for _, work in found):
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
    )


def fit(
    times: Sequence[float], counts: Sequence[Sequence[float]], least: Sequence[float]
) -> list[float]:
    """Rates at or above ``least`` whose sums ``counts @ rates`` are nearest to some times, each
    error over its time: coordinate descent, which for so few rates ends in no time."""
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
    """Runs of whole blocks of keys around runs of queries."""
    run = stride * block
    return _line(tokens), Neighborhood((1, 1, run + 2 * blocks * block), stride=(1, 1, run))


def _cubes(tokens: int, block: int) -> tuple[TokenLayout, Pattern]:
    side = round(tokens ** (1 / 3)) // 8 * 8
    grid = Grid(tokens // side**2, side, side)
    return TokenLayout(grid), Neighborhood((8, 8, 8), stride=8)


# what is measured, at a number of tokens and the greater side of a block
CASES: dict[str, Callable[[int, int], tuple[TokenLayout, Pattern]]] = {
    "launch": lambda tokens, block: (_line(block), Diagonal(0)),
    "short": lambda tokens, block: _runs(tokens, block, 1),
    "long": lambda tokens, block: _runs(tokens, block, 6),
    "steps": lambda tokens, block: (_line(8 * block), Neighborhood(1.0, causal=True)),
    "masked": lambda tokens, block: (_line(tokens), Diagonal(block)),
    "broad": lambda tokens, block: _runs(tokens, block, 2, stride=4),
    "ordered": _cubes,
}


def _clock(device: torch.device, seconds: float) -> Timer:
    """The least of as many runs as fit, three at least, after one that is not counted: what else
    the machine does can only add to it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def least(name: str, run: Callable[[], object]) -> float:
        run()
        wait()
        end = time.perf_counter() + seconds
        found: list[float] = []
        while len(found) < LEAST or (time.perf_counter() < end and len(found) < 100):
            begin = time.perf_counter()
            run()
            wait()
            found.append(time.perf_counter() - begin)
        return min(found)

    return least


def device_name(device: torch.device) -> str:
    """What a device is called: a GPU by its name, a CPU by its kind and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _key(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    try:
        import triton

        triton_version = str(triton.__version__)
    except ImportError:
        triton_version = "none"
    versions = (__version__, torch.__version__, triton_version, platform.node())
    return "|".join([device_name(device), str(dtype), str(head_size), *versions])


def _folder() -> Path:
    own = os.environ.get("VISATTN_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visattn"


def _read(path: Path, key: str) -> Calibration | None:
    try:
        value: Any = json.loads(path.read_text())
        if value.pop("key") != key:
            return None
        value["block"] = tuple(value["block"])
        found = Calibration(**value)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    rates = (found.launch, found.row, found.full, found.partial, found.moved, found.dense)
    good = all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in rates)
    return found if good and found.slots > 0 and found.full > 0 and found.dense > 0 else None


def _write(path: Path, key: str, found: Calibration) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"key": key} | asdict(found), indent=1).encode())
    except OSError as error:
        logger.warning("visattn: the calibration is not kept: %s", error)
