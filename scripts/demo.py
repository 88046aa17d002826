"""Run every pattern once against dense attention on a CPU-sized video, and draw the gallery.

    python scripts/demo.py [--json FILE]        (make demo)

Each result is first compared with the float64 reference; a pattern whose error is too large is not
timed, and the exit code is 1. Times are medians of a few runs and say what this machine does with
2080 tokens, not what sparse attention is for.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from draw_patterns import examples, gallery

import visattn
from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention import choose_backend
from visattn.execute import block_sizes
from visattn.patterns import Pattern
from visattn.picture import save_png
from visattn.view import view_pattern

LAYOUT = TokenLayout(Grid(8, 16, 16), text_before=32)
HEADS, DIM = 4, 64
REPEATS = 5
GALLERY = Path("out/demo/gallery.png")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs() -> Tensors:
    """Queries, keys and values, float32 ``[1, H, L, D]``."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, HEADS, LAYOUT.length, DIM, generator=generator).unbind()
    return q, k, v


def median_ms(run: Callable[[], object]) -> float:
    """Median time after one warm-up, in milliseconds."""
    run()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def errors(pattern: Pattern, tensors: Tensors) -> tuple[float, float]:
    """Largest error against the float64 reference, and the largest allowed: one and a half times
    that of plain masked attention in float32, and one unit in the last place."""
    q, k, v = tensors
    exact = sparse_attention(
        q.double(), k.double(), v.double(), pattern, LAYOUT, backend="reference"
    )
    eager = sparse_attention(q, k, v, pattern, LAYOUT, backend="reference")
    out = sparse_attention(q, k, v, pattern, LAYOUT)
    unit = torch.finfo(torch.float32).eps * float(exact.abs().max())
    allowed = 1.5 * float((eager - exact).abs().max()) + unit
    return float((out - exact).abs().max()), allowed


def measure(name: str, pattern: Pattern, tensors: Tensors, dense_ms: float) -> dict[str, object]:
    """One row of the table."""
    view = view_pattern(pattern, LAYOUT, *block_sizes(LAYOUT.length))
    error, allowed = errors(pattern, tensors)
    row: dict[str, object] = {
        "name": name,
        "pattern": repr(pattern),
        "density": round(view.density, 4),
        "block_density": round(view.block_map.block_density, 4),
        "max_error": float(f"{error:.3g}"),
        "max_error_allowed": float(f"{allowed:.3g}"),
        "correct": error <= allowed,
    }
    if row["correct"]:
        sparse_ms = median_ms(lambda: sparse_attention(*tensors, pattern, LAYOUT))
        row |= {"time_ms": round(sparse_ms, 2), "speedup": round(dense_ms / sparse_ms, 2)}
    return row


def line_of(row: dict[str, object]) -> str:
    """A row as text."""
    text = f"{row['name']:<15}{row['density']:>8.3f}{row['block_density']:>15.3f}"
    text += f"{row['max_error']:>12.1e}"
    if not row["correct"]:
        return f"{text}   wrong: more than {row['max_error_allowed']:.1e} allowed, not timed"
    return f"{text}{row['time_ms']:>10.1f}{row['speedup']:>9.2f}x"


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every pattern once against dense attention.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    GALLERY.parent.mkdir(parents=True, exist_ok=True)
    save_png(gallery(), GALLERY)
    print(f"wrote {GALLERY}\n")
    tensors = inputs()
    dense_ms = median_ms(lambda: torch.nn.functional.scaled_dot_product_attention(*tensors))
    machine = {
        "visattn": visattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "backend": choose_backend("auto", tensors[0]).backend,
        "layout": str(LAYOUT),
        "tokens": LAYOUT.length,
        "heads": HEADS,
        "head_dim": DIM,
        "dtype": "float32",
        "repeats": REPEATS,
    }
    print(
        f"torch {torch.__version__} on the CPU, {machine['threads']} threads\n"
        f"{LAYOUT}: {LAYOUT.length} tokens, {HEADS} heads of {DIM}, float32\n"
        f"sparse: backend {machine['backend']}, median of {REPEATS} runs\n"
        f"dense: scaled_dot_product_attention of torch, {dense_ms:.1f} ms\n"
    )
    print("pattern         density  block density   max error   time ms   to dense")
    rows = []
    for name, pattern in examples().items():
        rows.append(measure(name, pattern, tensors, dense_ms))
        print(line_of(rows[-1]), flush=True)
    if args.json is not None:
        result = {"machine": machine, "dense_ms": round(dense_ms, 2), "patterns": rows}
        args.json.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    wrong = [str(row["name"]) for row in rows if not row["correct"]]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
