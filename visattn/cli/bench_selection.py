"""``visattn bench selection``: times of the selection of blocks."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from visattn.bench import SelectionTime, time_selection
from visattn.cli.machine import Machine, add_machine, at_least_one, read_machine
from visattn.cli.show import read_grid
from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import parse_pattern
from visattn.plan.show.columns import aligned
from visattn.selectors import SELECTORS, Reuse, Selector, SkipList

# Token grids: those that a CPU finishes in a minute, and those of video models.
CPU_GRIDS = ("8x32x32", "16x32x32")
GPU_GRIDS = ("21x30x52", "21x45x80", "33x45x80")


@dataclass(frozen=True)
class Request:
    """The selectors, the sizes and the device of a measurement."""

    layouts: list[TokenLayout]
    selectors: list[Selector]
    heads: int
    dim: int
    machine: Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pattern",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="dynamic patterns in written form (default: all, with their default parameters)",
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        metavar="TxHxW",
        help=f"token grids (default: {' '.join(CPU_GRIDS)}; on a GPU {' '.join(GPU_GRIDS)})",
    )
    parser.add_argument(
        "--heads", type=int, default=4, metavar="N", help="number of heads (default %(default)s)"
    )
    parser.add_argument(
        "--head-size", type=int, metavar="N", help="channels of a head (default 64; on a GPU 128)"
    )
    add_machine(parser, repeats=5)


def run(args: argparse.Namespace) -> str:
    request = read(args)
    results = [
        time_selection(
            selector,
            layout,
            heads=request.heads,
            dim=request.dim,
            dtype=request.machine.dtype,
            device=request.machine.device,
            repeats=request.machine.repeats,
        )
        for layout in request.layouts
        for selector in request.selectors
    ]
    if args.json:
        return json.dumps(where(request) | {"times": [x.numbers() for x in results]}, indent=2)
    return table(request, results)


def read(args: argparse.Namespace) -> Request:
    """Read the arguments.

    Raises:
        ValueError: a pattern is not dynamic, a grid is invalid, or a number is below 1.
    """
    machine = read_machine(args)
    at_least_one(args, "heads", "head_size")
    selectors = []
    for text in args.pattern or [name for name in SELECTORS if name != "reuse"]:
        selector = parse_pattern(text)
        if not isinstance(selector, Selector):
            raise ValueError(
                f"--pattern {text} is static, so no blocks are selected at run time; use one of "
                f"{', '.join(SELECTORS)}"
            )
        if isinstance(selector, Reuse | SkipList) and args.pattern:
            raise ValueError(
                f"--pattern {text} selects no blocks at most steps; give the selector inside it"
            )
        if not isinstance(selector, SkipList):
            selectors.append(selector)
    layouts = []
    for text in args.grid or (GPU_GRIDS if machine.gpu else CPU_GRIDS):
        layouts.append(TokenLayout(Grid(*read_grid(text))))
    return Request(
        layouts=layouts,
        selectors=selectors,
        heads=args.heads,
        dim=args.head_size or (128 if machine.gpu else 64),
        machine=machine,
    )


def where(request: Request) -> dict[str, object]:
    """Return the device, the versions and the sizes of the measurement."""
    return request.machine.where() | {"heads": request.heads, "head_size": request.dim}


def table(request: Request, results: list[SelectionTime]) -> str:
    """Return the times as text, the fastest selector first at each size."""
    head = ", ".join(f"{name} {value}" for name, value in where(request).items())
    columns = ("tokens", "dense ms", "choice ms", "of dense (quartiles)", "density", "pattern")
    rows = [
        (
            str(row.tokens),
            f"{1e3 * row.dense:.1f}",
            f"{1e3 * row.selection:.2f}",
            f"{row.share:.1%} ({row.share_low:.1%} to {row.share_high:.1%})",
            f"{row.density:.2f}",
            row.pattern,
        )
        for row in sorted(results, key=lambda x: (x.tokens, x.share))
    ]
    return "\n".join([head, "", *aligned([columns, *rows], numbers=len(columns) - 1)])
