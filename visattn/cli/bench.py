"""``visattn bench``: benchmarks on this machine."""

from __future__ import annotations

import argparse

from visattn.cli import bench_attention, bench_pipeline, bench_selection
from visattn.cli.output import Output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    attention = kinds.add_parser(
        "attention",
        help="time attention by patterns, dense attention and FlexAttention",
        allow_abbrev=False,
    )
    bench_attention.add_arguments(attention)
    selection = kinds.add_parser(
        "selection",
        help="time the selection of blocks by dynamic patterns, and dense attention",
        allow_abbrev=False,
    )
    bench_selection.add_arguments(selection)
    pipeline = kinds.add_parser(
        "pipeline",
        help="time a denoising step and a generation of published models, dense and with plans",
        allow_abbrev=False,
    )
    bench_pipeline.add_arguments(pipeline)


def run(args: argparse.Namespace) -> str | Output:
    if args.bench == "attention":
        return bench_attention.run(args)
    if args.bench == "pipeline":
        return bench_pipeline.run(args)
    return bench_selection.run(args)
