"""``visattn bench``: measurements on this machine."""

from __future__ import annotations

import argparse

from visattn.cli import bench_attention, bench_selection
from visattn.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    attention = kinds.add_parser(
        "attention",
        help="attention by patterns beside dense attention and FlexAttention",
        allow_abbrev=False,
    )
    bench_attention.add_arguments(attention)
    selection = kinds.add_parser(
        "selection",
        help="what choosing the blocks of dynamic patterns costs beside dense attention",
        allow_abbrev=False,
    )
    bench_selection.add_arguments(selection)


def run(args: argparse.Namespace) -> str | Output:
    if args.bench == "attention":
        return bench_attention.run(args)
    return bench_selection.run(args)
