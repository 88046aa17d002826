"""The prompts of a search: options of the commands that search."""

from __future__ import annotations

import argparse

from visattn.generation.prompts import PROMPTS_FILE, model_prompts, read_prompt_lines

__all__ = ["add_prompt_arguments", "read_prompts"]


def add_prompt_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add the options; ``purpose`` says what the prompts are used for."""
    parser.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help=f"prompts {purpose} (default: those of the small model)",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help=f"file of prompts {purpose}, one on each line"
    )


def read_prompts(args: argparse.Namespace, model: str) -> tuple[list[str], list[str] | None]:
    """Return the prompts of the arguments, or else those of the model with its held-out ones.

    Args:
        args: the parsed arguments.
        model: folder or hub id of a pipeline.

    Returns:
        The prompts, and the held-out prompts of the model, or None if the arguments have prompts.

    Raises:
        ValueError: there are no prompts, or they are given twice.
        OSError: a file cannot be read.
    """
    if args.prompt and args.prompts is not None:
        raise ValueError("give either prompts or --prompts FILE, not both")
    if args.prompts is not None:
        return read_prompt_lines(args.prompts), None
    if args.prompt:
        return list(args.prompt), None
    known = model_prompts(model)
    if known is None:
        raise ValueError(f"model {model!r} has no {PROMPTS_FILE}; give prompts, or --prompts FILE")
    return known
