"""``visattn search-heads``: find the heads whose perturbation guides a pipeline best."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from visattn._atomic import check_writable
from visattn.cli.generation_options import (
    add_job_arguments,
    add_model_arguments,
    job_fields,
    read_loading,
    read_one_plan,
)
from visattn.cli.output import Output
from visattn.generation import load_pipeline
from visattn.generation.prompts import model_prompts, read_prompt_lines
from visattn.generation.silence_logs import quiet
from visattn.guidance.guiders.soft_pag import SoftPAG
from visattn.guidance.head_search.driver import search_heads
from visattn.guidance.head_search.objectives import Objective, caption_score
from visattn.guidance.head_set import HeadSet
from visattn.guidance.registry import parse_heads
from visattn.inject import apply_plan
from visattn.runtime.processes import processes
from visattn.runtime.progress import ProgressBar

SCORER = "scorer"
UNUSED = ("seed", "image", "fps")
MAX_SEEDS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="prompts to search with (default: those that lie beside the small model)",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="a file of prompts to search with, one a line"
    )
    parser.add_argument(
        "--seeds",
        default="0",
        metavar="N,...",
        help="every prompt is generated with each, as in 0,1,2 or 0-4 (default 0)",
    )
    parser.add_argument(
        "--objective",
        default=SCORER,
        metavar="MODULE:FUNCTION",
        help="of frames [T, H, W, 3] in [0, 1] and their prompt: a number, larger for better ones; "
        f"or {SCORER}: what captions of the small model say (default {SCORER})",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="how many there are (default 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=1, metavar="N", help="heads that a round adds (default 1)"
    )
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="X", help="of the heads (default 1)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=3.0,
        metavar="X",
        help="of the guidance by the heads; that of the prompt is --guidance-scale (default 3)",
    )
    parser.add_argument(
        "--policy",
        choices=("all", "image_rows", "ii_identity", "ii_renorm"),
        default="all",
        help="which tokens of joint attention are perturbed (default all)",
    )
    parser.add_argument(
        "--target",
        choices=("value", "uniform", "mean_query"),
        default="value",
        help="what heads are moved towards (default value: the identity)",
    )
    for name, text in (
        ("candidates", "heads to try, as in '{3: [2], 7: None}', or a file of heads (default all)"),
        ("keep", "heads that are perturbed from the start, in the same form"),
    ):
        parser.add_argument(f"--{name}", metavar="HEADS", help=text)
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="heads in one generation (default 1)"
    )
    parser.add_argument(
        "--output", "-o", required=True, metavar="FILE.json", help="for the heads that are found"
    )
    parser.add_argument(
        "--resume",
        metavar="FILE.jsonl",
        help="every score is added to this file, and a search with the same settings goes on from "
        "it (default: OUTPUT with the suffix .jsonl)",
    )
    add_job_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")


def run(args: argparse.Namespace) -> Output:
    for name in UNUSED:
        if getattr(args, name) is not None:
            remedy = "take --seeds" if name == "seed" else "leave it out"
            raise ValueError(f"--{name} is not for a search of heads; {remedy}")
    for name in ("rounds", "top_k", "batch"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(args, name)} must be at least 1")
    SoftPAG(None, args.strength, args.scale, policy=args.policy, target=args.target)
    output = read_output(args.output)
    log = Path(args.resume) if args.resume is not None else output.with_suffix(".jsonl")
    seeds = read_seeds(args.seeds)
    candidates = read_heads("candidates", args.candidates)
    keep = read_heads("keep", args.keep)
    objective = read_objective(args.objective)
    loading = read_loading(args)
    prompts = read_prompts(args, loading.model)
    fields = job_fields(args)
    backend = args.backend or "auto"
    plan = read_one_plan(args.plan, loading, backend)
    pipe = load_pipeline(loading)
    with quiet() as said:
        if plan is not None:
            apply_plan(pipe, plan, backend=backend)
        found = search_heads(
            pipe,
            objective,
            prompts,
            seeds=seeds,
            k=args.top_k,
            rounds=args.rounds,
            strength=args.strength,
            scale=args.scale,
            policy=args.policy,
            target=args.target,
            candidates=candidates,
            batch=args.batch,
            call=fields,
            keep=keep,
            resume=log,
            progress=ProgressBar() if processes().first else None,
        )
    if not processes().first:  # the first one writes and tells
        return Output("")
    found.save(output)
    numbers = found.provenance
    failures = [f"{row['item']}: {row['error']}" for row in numbers["failures"]]
    if args.json:
        value = {"output": str(output), "log": str(log), "heads": json.loads(found.to_json())}
        return Output(json.dumps(value, indent=2, sort_keys=True), failures)
    notes = [line for line in said if "search_heads left out" not in line]
    return Output(text_of(found, output, notes), failures)


def text_of(found: HeadSet, output: Path, notes: list[str]) -> str:
    """What was found, for a terminal."""
    numbers = found.provenance
    lines = []
    for number, row in enumerate(numbers["rounds"], 1):
        heads = ", ".join(f"{layer}:{head} ({score:.4f})" for layer, head, score in row["added"])
        lines.append(f"round {number}: {heads}; mean of {row['candidates']}: {row['mean']:.4f}")
    before, after = numbers["score"]["without"], numbers["score"]["with"]
    reached = "not known" if after is None else f"{after:.4f}"
    pairs = len(numbers["pairs"])
    lines.append(f"objective: {reached} with the heads, {before:.4f} without, {pairs} generations")
    if after is not None and after <= before:
        lines.append("note: the objective is no better with the heads than without")
    lines += [f"note: {line}" for line in notes]
    use = f'use: --guidance "SoftPAG(heads={str(output)!r})"'
    return "\n".join([*lines, f"wrote {output}", use])


def read_output(text: str) -> Path:
    """Where the heads go.

    Raises:
        ValueError, OSError: they cannot go there, or something else lies there.
    """
    path = Path(text)
    if path.suffix != ".json":
        raise ValueError(f"--output {text!r} must end in .json")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {text!r} is a folder, or lies in one that is not there")
    if path.exists():
        try:
            HeadSet.load(path)
        except ValueError:
            raise ValueError(
                f"--output {text!r} is there and is no head set; name another file"
            ) from None
    check_writable(path)
    return path


def read_seeds(text: str) -> list[int]:
    """Numbers and ranges of them.

    Raises:
        ValueError: the text holds something else.
    """
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last or last - first >= MAX_SEEDS:
            raise ValueError(f"--seeds {text!r} must be numbers from 0 on, as in 0,1,2 or 0-4")
        found += range(first, last + 1)
    return found


def read_heads(name: str, text: str | None) -> Any:
    """Heads of an option, or None.

    Raises:
        ValueError: the text says none.
    """
    if text is None:
        return None
    try:
        return parse_heads(text)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None


def read_objective(text: str) -> Objective:
    """The objective of a name; modules of the working folder are found too.

    Raises:
        ValueError: there is none, or its module cannot be imported.
    """
    if text == SCORER:
        return caption_score
    module, colon, name = text.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ValueError(
            f"--objective {text!r} must be {SCORER}, or MODULE:FUNCTION as in mine.scores:aesthetic"
        )
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # it is the caller's code
        raise ValueError(
            f"--objective {text!r} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ValueError(f"--objective {text!r} is no function")
    return found  # type: ignore[no-any-return]


def read_prompts(args: argparse.Namespace, model: str) -> list[str]:
    """Prompts to search with.

    Raises:
        ValueError, OSError: none are given, twice, or a file cannot be read.
    """
    if args.prompt and args.prompts is not None:
        raise ValueError("give prompts, or --prompts with a file of them, not both")
    if args.prompts is not None:
        return read_prompt_lines(args.prompts)
    if args.prompt:
        return list(args.prompt)
    known = model_prompts(model)
    if known is None:
        raise ValueError(
            f"model {model!r} has no prompts of its own; give some to search with, or --prompts"
        )
    return known[0]
