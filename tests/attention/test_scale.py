"""Nothing but the reference makes an N x N tensor, and any pattern lowers fast at 118,800
tokens."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.lowering import lower_cached
from visattn.patterns import (
    PATTERNS,
    AxisOrder,
    Block,
    Dense,
    Diagonal,
    GridBlocks,
    Halo,
    MultiDiagonal,
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

NEAR = tuple((t, h, w) for t in range(-2, 3) for h in range(-1, 2) for w in range(-1, 2))
CASES: list[Pattern] = [
    Dense(),
    Skip(),
    Diagonal(0.05),
    MultiDiagonal(0.05),
    Stripe(),
    Stripe(False, (0.1, 0.5, (0.7, 0.71))),
    Radial(0.95),
    Radial(0.2, sink=True),
    Radial(0.5, sink=True, rule="token"),
    Radial(sink=True, rule="paper"),
    Neighborhood((0.5, 0.3, 0.3)),
    Neighborhood((0.3, 0.25, 0.25), (2, 2, 2), (1, 2, 2), (True, False, False)),
    SlidingTile((2, 4, 8), (3, 3, 1)),
    Block((2, 8, 8)),
    ShiftedBlock((2, 8, 8)),
    GridBlocks((2, 4, 4)),
    Halo((2, 4, 4), (1, 2, 2)),
    Sharded(4, 8),
    Sharded(4, 8, causal=True),
    Stencil((2, 8, 8), NEAR, (0, 3)),
    Stencil((1, 2, 4), NEAR),
    AxisOrder(Neighborhood((0.2, 0.2, 1.0)), "hwt"),
    AxisOrder(Radial(rule="token"), "wht"),
    Union(Diagonal(0.01), Stripe()),
    Union(Neighborhood((0.3, 0.3, 0.3)), Stripe(), MultiDiagonal(0.01)),
    Union(Radial(), Stripe(False, ((100, 500),))),
    Sharded(4, 8, block=32),  # the finest runs, of which there are most
    Radial(block=32),
    Union(SlidingTile((2, 8, 8), (3, 1, 1)), Sharded(4, 8, block=32)),
]


def test_every_pattern_is_measured() -> None:
    assert {pattern.name for pattern in CASES} == set(PATTERNS)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                self.elements = max(
                    self.elements, leaf.untyped_storage().nbytes() // leaf.element_size()
                )
        return out


def bound(tokens: int, block: int) -> int:
    """What may be made: a few numbers a token or a block pair, and temporaries of a fixed size."""
    return 64 * tokens + 8 * (tokens // block + 64) ** 2 + (1 << 22)


def test_the_bound_is_far_below_the_square() -> None:
    assert bound(16384, 128) < 16384**2 / 40 and bound(65536, 128) < 65536**2 / 300


@pytest.mark.sampled(4)
@pytest.mark.parametrize("pattern", CASES, ids=repr)
@pytest.mark.parametrize("grid", [Grid(8, 32, 16), Grid(8, 64, 32), Grid(16, 64, 64)], ids=str)
def test_lowering_makes_nothing_of_size_n_squared(pattern: Pattern, grid: Grid) -> None:
    layout = TokenLayout(grid, text_after=100)
    with Largest() as largest:
        pattern.lower(layout, 128, 128)
        if grid.numel < 16384 or not isinstance(pattern, Union):  # a union counts pair by pair
            pattern.density(layout)
    assert 0 < largest.elements <= bound(layout.length, 128)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mode", ["plain", "lse", "text"])
@pytest.mark.parametrize("pattern", CASES, ids=repr)
def test_blockwise_makes_nothing_of_size_n_squared(
    pattern: Pattern, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the length, the largest tensor is a chunk, one row of blocks, or the distinct
    tiles."""
    monkeypatch.setattr("visattn.attention.backends.blockwise.CHUNK", 1 << 17)
    monkeypatch.setattr("visattn.attention.backends.blockwise_cpu.LOGITS", 1 << 17)
    monkeypatch.setattr("visattn.attention.backends.workspace._KEPT.tensors", {})
    for grid in (Grid(8, 16, 16), Grid(8, 32, 16)):
        layout = TokenLayout(grid, text_after=100)
        q, k, v = (torch.randn(1, 1, layout.length, 8) for _ in range(3))
        lengths = torch.tensor([60]) if mode == "text" else None
        with Largest() as largest:
            sparse_attention(
                q, k, v, pattern, layout, text_lengths=lengths, return_lse=mode == "lse"
            )
        row = 64 * layout.length
        tiles = lower_cached(pattern, layout, None, 64, 64).tiles[0].numel()
        assert largest.elements <= max(2 << 17, 2 * row, 2 * tiles, 2 << 20)
    assert layout.length**2 / 8 > 2 << 20


def lower_in_a_child(pattern: Pattern) -> dict[str, float]:
    """CPU seconds and peak megabytes that lowering takes, in a forked process with nothing
    cached."""
    read, write = os.pipe()
    if os.fork() == 0:
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.process_time()
        pattern.lower(TokenLayout(Grid(33, 45, 80), text_after=256), 128, 128)
        seconds = time.process_time() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(
            write, json.dumps({"seconds": seconds, "megabytes": (peak - base) / 1024}).encode()
        )
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        return dict(json.loads(file.read()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux reports it")
def test_lowering_at_118800_tokens_takes_a_second_and_200_megabytes() -> None:
    """CPU time of one thread, so that other programs hardly count."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, str(Path(__file__)), "measure"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(run.stdout)
    assert len(results) == len(CASES)
    for name, result in results.items():
        assert result["seconds"] < 1 and result["megabytes"] < 200, (name, result)


if __name__ == "__main__" and sys.argv[1:] == ["measure"]:
    torch.set_num_threads(1)
    torch.arange(1 << 20).cumsum(0).sort()  # torch's own first-use costs are not the pattern's
    print(json.dumps({repr(pattern): lower_in_a_child(pattern) for pattern in CASES}))
