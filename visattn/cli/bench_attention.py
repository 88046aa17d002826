"""``visattn bench attention``: times of attention by patterns."""

from __future__ import annotations

import argparse
import json

from visattn.bench import SHAPES, AttentionTime, Scattered, WrongResult, time_attention
from visattn.cli.machine import Machine, add_machine, read_machine
from visattn.cli.output import Output
from visattn.cost import calibration_of
from visattn.patterns import Pattern, parse_pattern
from visattn.plan.show.columns import aligned

SCATTERED = "scattered:"
COLUMNS = (
    "density",
    "executed",
    "dense ms",
    "ours ms",
    "predicted",
    "flex ms",
    "speedup",
    "efficiency (quartiles)",
    "TFLOP/s",
    "pattern",
)
# Bands of whole blocks and of tokens, tile-aligned boxes, radial: no order of tokens is needed.
CPU_PATTERNS = {
    "cpu-8k": (
        "neighborhood((8, 12, 12), stride=(8, 4, 8))",
        "neighborhood((4, 12, 16), stride=(4, 4, 8))",
        "scattered:0.05",
        "scattered:0.15",
        "scattered:0.25",
    ),
    "cpu-8k-line": (
        "neighborhood((1, 1, 640), stride=(1, 1, 128))",
        "neighborhood((1, 1, 1152), stride=(1, 1, 128))",
        "neighborhood((1, 1, 1920), stride=(1, 1, 128))",
        "diagonal(205)",
        "diagonal(1024)",
    ),
    "cpu-8k-frames": ("radial()",),
}
CPU_SHAPES = tuple(CPU_PATTERNS)
GPU_SHAPES = ("wan-1.3b-480p", "wan-14b-720p", "hunyuan-768p", "hunyuan-720p", "flux-2k")
PATTERNS = (
    "diagonal(0.05)",
    "diagonal(0.1)",
    "neighborhood((0.5, 0.5, 0.5))",
    "radial(0.2)",
    "scattered:0.05",
    "scattered:0.25",
)
LONG = 16384  # with more tokens, dense attention on a CPU takes minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        nargs="+",
        action="extend",
        choices=SHAPES,
        metavar="NAME",
        help=f"one of {', '.join(SHAPES)} (default: {' '.join(CPU_SHAPES)}; on a GPU "
        f"{' '.join(GPU_SHAPES)})",
    )
    parser.add_argument(
        "--pattern",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="static patterns in written form, or scattered:SHARE for random blocks (default: "
        f"{' '.join(PATTERNS)}; on a CPU a few for each shape)",
    )
    parser.add_argument("--no-flex", action="store_true", help="do not time FlexAttention")
    add_machine(parser, repeats=7)


def run(args: argparse.Namespace) -> Output:
    machine = read_machine(args)
    names = args.shape or (GPU_SHAPES if machine.gpu else CPU_SHAPES)
    for name in names:
        if not machine.gpu and SHAPES[name].layout.length > LONG:
            raise ValueError(
                f"--shape {name} has {SHAPES[name].layout.length} tokens, which take minutes on a "
                f"CPU; use {', '.join(CPU_SHAPES)} or --device cuda"
            )
    results: dict[str, list[AttentionTime]] = {}
    wrong: list[str] = []
    for name in names:
        usual = PATTERNS if machine.gpu else CPU_PATTERNS.get(name, PATTERNS)
        for pattern in [read_pattern(text) for text in args.pattern or usual]:
            try:
                time = time_attention(
                    pattern,
                    SHAPES[name],
                    dtype=machine.dtype,
                    device=machine.device,
                    repeats=machine.repeats,
                    flex=not args.no_flex,
                    calibration=calibration_of(
                        machine.device, machine.dtype, SHAPES[name].head_size
                    ),
                )
            except WrongResult as error:
                wrong.append(f"{name}: {error}")
                continue
            results.setdefault(name, []).append(time)
    if args.json:
        times = {name: [row.numbers() for row in rows] for name, rows in results.items()}
        return Output(json.dumps(machine.where() | {"times": times}, indent=2), tuple(wrong))
    return Output(table(machine, results), tuple(wrong))


def cells_of(row: AttentionTime) -> tuple[str, ...]:
    """Return the cells of ``COLUMNS`` for a time."""
    quartiles = f"({row.efficiency.low:.2f} to {row.efficiency.high:.2f})"
    return (
        f"{row.density:.3f}",
        f"{row.executed:.3f}",
        f"{1e3 * row.dense.median:.2f}",
        f"{1e3 * row.sparse.median:.2f}",
        f"{1e3 * (row.predicted or 0):.2f}",
        f"{1e3 * row.flex.median:.2f}" if row.flex else "-",
        f"{row.dense.median / row.sparse.median:.2f}x",
        f"{row.efficiency.median:.2f} {quartiles}",
        f"{row.tflops:.2f}",
        str(row.pattern),
    )


def read_pattern(text: str) -> Pattern:
    """Read a static pattern.

    Raises:
        ValueError: the text is no static pattern.
    """
    if text.startswith(SCATTERED):
        try:
            return Scattered(float(text.removeprefix(SCATTERED)))
        except ValueError as error:
            raise ValueError(f"--pattern {text}: {error}") from None
    pattern = parse_pattern(text)
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"--pattern {text} is dynamic; 'visattn bench selection' times its selection"
        )
    return pattern


def table(machine: Machine, results: dict[str, list[AttentionTime]]) -> str:
    """Return the times as text, with a table for each shape."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.where().items())]
    for name, rows in results.items():
        first = rows[0]
        lines += ["", f"{name}: {first.tokens} tokens, {first.heads} heads of {first.head_size}"]
        lines += aligned([COLUMNS, *map(cells_of, rows)], numbers=len(COLUMNS) - 1)
        reasons = {key: text for row in rows for key, text in row.missing.items()}
        lines += [f"{key} did not run: {text}" for key, text in reasons.items()]
    return "\n".join(lines)
