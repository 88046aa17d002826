"""``visattn bench selection``: what choosing blocks costs."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from visattn.bench import SelectionTime, time_selection
from visattn.cli.machine import Machine, add_machine, at_least_one, read_machine
from visattn.cli.show import read_grid
from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import parse_pattern
from visattn.selectors import SELECTORS, Reuse, Selector, SkipList

# Shapes of tokens: what a CPU can do in a minute, and those of video models.
CPU_GRIDS = ("8x32x32", "16x32x32")
GPU_GRIDS = ("21x30x52", "21x45x80", "33x45x80")


@dataclass(frozen=True)
class Request:
    """What is measured, on what."""

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
        help="dynamic patterns in written form (default: all, with their own parameters)",
    )
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        metavar="TxHxW",
        help=f"token grids (default: {' '.join(CPU_GRIDS)}; on a GPU {' '.join(GPU_GRIDS)})",
    )
    parser.add_argument("--heads", type=int, default=4, metavar="N", help="(default %(default)s)")
    parser.add_argument("--head-size", type=int, metavar="N", help="(default 64; on a GPU 128)")
    add_machine(parser, repeats=5)


def run(args: argparse.Namespace) -> str:
    request = read(args)
    found = [
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
        return json.dumps(where(request) | {"times": [x.numbers() for x in found]}, indent=2)
    return table(request, found)


def read(args: argparse.Namespace) -> Request:
    """The request of the arguments.

    Raises:
        ValueError: a pattern is not dynamic, a grid is none, or a number is not above 0.
    """
    machine = read_machine(args)
    at_least_one(args, "heads", "head_size")
    selectors = []
    for text in args.pattern or [name for name in SELECTORS if name != "reuse"]:
        selector = parse_pattern(text)
        if not isinstance(selector, Selector):
            raise ValueError(
                f"--pattern {text} is static, and nothing of it is chosen at run time; use one of "
                f"{', '.join(SELECTORS)}"
            )
        if isinstance(selector, Reuse | SkipList) and args.pattern:
            raise ValueError(
                f"--pattern {text} costs nothing at most steps; measure the selector within"
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
    """What the numbers are of."""
    return request.machine.where() | {"heads": request.heads, "head_size": request.dim}


def table(request: Request, found: list[SelectionTime]) -> str:
    """The numbers, cheapest first at each size."""
    head = ", ".join(f"{name} {value}" for name, value in where(request).items())
    lines = [head, "", "tokens    dense ms  choice ms  of dense  (quartiles)     density  pattern"]
    for row in sorted(found, key=lambda x: (x.tokens, x.share)):
        lines.append(
            f"{row.tokens:<8}{1e3 * row.dense:>10.1f}{1e3 * row.selection:>11.2f}"
            f"{row.share:>10.1%}  ({row.share_low:.1%} to {row.share_high:.1%})"
            f"{row.density:>9.2f}  {row.pattern}"
        )
    return "\n".join(lines)
