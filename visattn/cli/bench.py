"""``visattn bench``: measurements on this machine."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass

import torch

from visattn._version import __version__
from visattn.bench import SelectionTime, time_selection
from visattn.cli.env import devices
from visattn.cli.show import read_grid
from visattn.layout import Grid, TokenLayout
from visattn.patterns import parse_pattern
from visattn.selectors import SELECTORS, Reuse, Selector, SkipList

# Shapes of tokens: what a CPU can do in a minute, and those of video models.
CPU_GRIDS = ("8x32x32", "16x32x32")
GPU_GRIDS = ("21x30x52", "21x45x80", "33x45x80")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Request:
    """What is measured, on what."""

    layouts: list[TokenLayout]
    selectors: list[Selector]
    heads: int
    dim: int
    dtype: str
    device: str
    repeats: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    selection = kinds.add_parser(
        "selection",
        help="what choosing the blocks of dynamic patterns costs beside dense attention",
        allow_abbrev=False,
    )
    selection.add_argument(
        "--pattern", nargs="+", action="extend", metavar="PATTERN",
        help="dynamic patterns in written form (default: all, with their own parameters)",
    )
    selection.add_argument(
        "--grid", nargs="+", action="extend", metavar="TxHxW",
        help=f"token grids (default: {' '.join(CPU_GRIDS)}; on a GPU {' '.join(GPU_GRIDS)})",
    )
    selection.add_argument(
        "--heads", type=int, default=4, metavar="N", help="(default %(default)s)"
    )
    selection.add_argument(
        "--head-size", type=int, metavar="N", help="(default 64; on a GPU 128)"
    )
    selection.add_argument(
        "--dtype", choices=DTYPES, help="(default float32; on a GPU bfloat16)"
    )
    selection.add_argument("--device", help="(default: a GPU where there is one)")
    selection.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of each (default %(default)s)"
    )
    selection.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> str:
    request = read(args)
    found = [
        time_selection(
            selector,
            layout,
            heads=request.heads,
            dim=request.dim,
            dtype=DTYPES[request.dtype],
            device=request.device,
            repeats=request.repeats,
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
    gpu = torch.cuda.is_available() if args.device is None else args.device.startswith("cuda")
    for name in ("heads", "repeats", "head_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
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
    for text in args.grid or (GPU_GRIDS if gpu else CPU_GRIDS):
        layouts.append(TokenLayout(Grid(*read_grid(text))))
    return Request(
        layouts=layouts,
        selectors=selectors,
        heads=args.heads,
        dim=args.head_size or (128 if gpu else 64),
        dtype=args.dtype or ("bfloat16" if gpu else "float32"),
        device=args.device or ("cuda" if gpu else "cpu"),
        repeats=args.repeats,
    )


def where(request: Request) -> dict[str, object]:
    """What the numbers are of."""
    return {
        "visattn": __version__,
        "torch": torch.__version__,
        "device": ", ".join(devices()) if request.device != "cpu" else platform.machine(),
        "threads": torch.get_num_threads(),
        "heads": request.heads,
        "head_size": request.dim,
        "dtype": request.dtype,
        "repeats": request.repeats,
    }


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
