"""``visattn show``: a pattern on a grid, or a plan, as text, as a picture or as numbers."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path

from visattn.attention.lowering import block_sizes
from visattn.blocks.block_map import PartialPolicy
from visattn.cli.show_plan import read_shown, show_difference, show_plan
from visattn.draw.pattern_view import view_pattern, view_text
from visattn.geometry.layout import Grid, TokenLayout
from visattn.patterns import Pattern, parse_pattern
from visattn.patterns.base.head_pattern import KINDS
from visattn.patterns.grammar.call_grammar import signature_of
from visattn.plan.read import is_pattern

EXAMPLE = "for example 'radial(decay=0.2, sink=True)'"
GRID = "8x16x16"
PARTIAL: PartialPolicy = "exact"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shown",
        nargs="?",
        metavar="PATTERN|PLAN",
        help=f"a pattern, {EXAMPLE}, or the file, folder or hub id of a plan",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the patterns and their parameters"
    )
    parser.add_argument(
        "--diff", metavar="PLAN", help="show the differences of this plan, head by head"
    )
    parser.add_argument(
        "--grid",
        metavar="TxHxW",
        help="latent frames, rows and columns; HxW for an image (default: the plan's, "
        f"{GRID} for a pattern)",
    )
    for place in ("before", "after"):
        parser.add_argument(
            f"--text-{place}",
            type=int,
            default=0,
            metavar="N",
            help=f"text tokens {place} the grid",
        )
    parser.add_argument(
        "--block", metavar="N", help="tokens of a block, or QxK (default: as in sparse_attention)"
    )
    parser.add_argument(
        "--partial",
        choices=("exact", "promote", "drop"),
        help=f"treatment of partly kept blocks (default {PARTIAL})",
    )
    parser.add_argument(
        "--query", metavar="t,h,w", help="the query whose keys are shown (default: the middle)"
    )
    parser.add_argument("--output", metavar="FILE.png", help="draw into this file")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> str:
    if args.list:
        if args.shown is not None:
            raise ValueError("--list takes no pattern and no plan; leave it out")
        return json.dumps(pattern_table(), indent=2, sort_keys=True) if args.json else list_text()
    if args.shown is None:
        raise ValueError(f"give a pattern, {EXAMPLE}, the file or folder of a plan, or --list")
    if args.output is not None and Path(args.output).suffix.lower() != ".png":
        raise ValueError(f"--output {args.output!r} must end in .png; no other format is written")
    if args.diff is None and is_pattern(args.shown):
        return show_pattern(args)
    for option in ("block", "partial", "query"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"--{option} is for patterns, but {args.shown!r} is no pattern; leave it out"
            )
    plan = read_shown(args.shown)
    named = args.grid is not None or args.text_before or args.text_after
    layout = read_layout(args, plan.geometry) if named else None  # a plan may have a layout
    if args.diff is None:
        return show_plan(plan, layout, name=args.shown, output=args.output, as_json=args.json)
    if args.output is not None:
        raise ValueError("--diff draws no picture; leave --output out")
    other, names = read_shown(args.diff), (args.shown, args.diff)
    return show_difference(plan, other, layout, names=names, as_json=args.json)


def show_pattern(args: argparse.Namespace) -> str:
    """Return a pattern on a grid as text or JSON, and draw it into a file."""
    layout = read_layout(args, TokenLayout(Grid(*read_grid(GRID))))
    assert layout is not None
    pattern = parse_pattern(args.shown)
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"{args.shown} is dynamic: its blocks depend on the queries and keys of a call, so "
            "there is no mask to show; visattn inspect shows what heads attend to"
        )
    view = view_pattern(
        pattern,
        layout,
        *(block_sizes(layout.length) if args.block is None else read_block(args.block)),
        partial=PARTIAL if args.partial is None else args.partial,
        query=None if args.query is None else read_query(args.query),
    )
    if args.output is not None:
        from visattn.draw.canvas import save_png
        from visattn.draw.pattern_picture import draw_view  # Pillow is loaded for pictures only

        save_png(draw_view(view), args.output)
    if args.json:
        return json.dumps(view.numbers(), indent=2, sort_keys=True)
    return view_text(view) if args.output is None else f"wrote {args.output}"


def read_layout(args: argparse.Namespace, geometry: TokenLayout | None) -> TokenLayout | None:
    """Return the token layout of the options: that of a geometry, with another grid or text."""
    text = args.text_before, args.text_after
    if args.grid is None and not any(text):
        return geometry
    grids = [] if geometry is None else [grid for _, grid in geometry.grids]
    if args.grid is not None or len(grids) != 1:
        grid = Grid(*read_grid(args.grid or GRID))
    else:
        grid = grids[0]
    if geometry is None or len(grids) != 1 or any(text):
        return TokenLayout(grid, *text)
    return TokenLayout(segments=[grid if part.grid else part for part in geometry.segments])


def read_integers(text: str, separator: str, option: str, form: str) -> tuple[int, ...]:
    """Read numbers between separators; ``form`` describes the valid text in the error message."""
    if not re.fullmatch(rf"\d{{1,9}}({separator}\d{{1,9}})*", text, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{option} {text!r} must be {form}")
    return tuple(int(number) for number in re.split(separator, text, flags=re.IGNORECASE))


def read_grid(text: str) -> tuple[int, int, int]:
    """Read ``"8x16x16"``, or ``"16x16"`` for one frame."""
    form = "frames, rows and columns as in 8x16x16, or rows and columns as in 16x16"
    sizes = read_integers(text, "x", "--grid", form)
    if len(sizes) not in (2, 3):
        raise ValueError(f"--grid {text!r} must be {form}")
    frames, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    return frames, height, width


def read_block(text: str) -> tuple[int, int]:
    """Read ``"64"`` or ``"128x64"``."""
    form = "a number of tokens as in 64, or queries and keys as in 128x64"
    sizes = read_integers(text, "x", "--block", form)
    if len(sizes) > 2:
        raise ValueError(f"--block {text!r} must be {form}")
    return sizes[0], sizes[-1]


def read_query(text: str) -> tuple[int, int, int]:
    """Read ``"4,8,8"``."""
    form = "frame, row and column of a token as in 4,8,8"
    place = read_integers(text, ",", "--query", form)
    if len(place) != 3:
        raise ValueError(f"--query {text!r} must be {form}")
    return place[0], place[1], place[2]


def pattern_table() -> list[dict[str, str]]:
    """Return the name, parameters and summary of every pattern."""
    return [
        {
            "name": name,
            "parameters": signature_of(kind),
            "summary": " ".join((kind.__doc__ or "").split("\n\n")[0].split()).replace("``", ""),
        }
        for name, kind in KINDS.items()
    ]


def list_text() -> str:
    """Return the table as text for a terminal."""
    lines = []
    for row in pattern_table():
        lines.append(f"{row['name']}({row['parameters']})")
        lines += textwrap.wrap(row["summary"], 92, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
