"""``visattn search-heads``: find the heads whose perturbation guides a pipeline best."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Mapping
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
from visattn.cli.prompt_options import add_prompt_arguments, read_prompts
from visattn.generation import load_pipeline
from visattn.generation.clip_shapes import SHAPES_FILE, read_scorer_name
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
# By the names in visattn_shapes.json. A fixed table: the file of a model cannot import code.
OBJECTIVES: Mapping[str, Objective] = {"captions": caption_score}
UNUSED = ("seed", "image", "fps")
MAX_SEEDS = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_arguments(parser, "of the search")
    parser.add_argument(
        "--seeds",
        default="0",
        metavar="N,...",
        help="seeds of every prompt, as in 0,1,2 or 0-4 (default 0)",
    )
    parser.add_argument(
        "--objective",
        metavar="MODULE:FUNCTION",
        help="function of frames [T, H, W, 3] in [0, 1] and their prompt, which returns a larger "
        f"number for better frames; or {SCORER}, for captions of the small model (default: the "
        f"scorer that {SHAPES_FILE} of the model names)",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="number of rounds (default 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=1, metavar="N", help="heads that a round adds (default 1)"
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="X",
        help="strength of the perturbation of the heads (default 1)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=3.0,
        metavar="X",
        help="scale of the guidance by the heads (default 3); --guidance-scale is for the prompt",
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
        help="target of the perturbation (default value: the identity)",
    )
    for name, text in (
        ("candidates", "heads to try, as in '{3: [2], 7: None}', or a file of heads (default all)"),
        ("keep", "heads that are perturbed in all rounds, in the same form"),
    ):
        parser.add_argument(f"--{name}", metavar="HEADS", help=text)
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="number of heads that are tried in one generation (default 1)",
    )
    parser.add_argument(
        "--output", "-o", required=True, metavar="FILE.json", help="file for the heads"
    )
    parser.add_argument(
        "--resume",
        metavar="FILE.jsonl",
        help="file of all scores, from which a search with the same settings resumes (default: "
        "OUTPUT with the suffix .jsonl)",
    )
    add_job_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the heads as JSON")


def run(args: argparse.Namespace) -> Output:
    for name in UNUSED:
        if getattr(args, name) is not None:
            remedy = "use --seeds" if name == "seed" else "leave it out"
            raise ValueError(f"--{name} cannot be used in a search of heads; {remedy}")
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
    objective = None if args.objective is None else read_objective(args.objective)
    loading = read_loading(args)
    prompts, _ = read_prompts(args, loading.model)
    fields = job_fields(args)
    backend = args.backend or "auto"
    plan = read_one_plan(args.plan, loading, backend)
    if objective is None:
        objective = default_objective(loading.model)
    pipe = load_pipeline(loading)
    with quiet() as log_lines:
        if plan is not None:
            apply_plan(pipe, plan, backend=backend)
        heads = search_heads(
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
    if not processes().first:  # the first process writes and prints
        return Output("")
    heads.save(output)
    numbers = heads.provenance
    failures = [f"{row['item']}: {row['error']}" for row in numbers["failures"]]
    if args.json:
        value = {"output": str(output), "log": str(log), "heads": json.loads(heads.to_json())}
        return Output(json.dumps(value, indent=2, sort_keys=True), failures)
    notes = [line for line in log_lines if "search_heads left out" not in line]
    return Output(text_of(heads, output, notes), failures)


def text_of(head_set: HeadSet, output: Path, notes: list[str]) -> str:
    """Return the result as text for a terminal."""
    numbers = head_set.provenance
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
    """Return the file for the heads.

    Raises:
        ValueError: the name is invalid, or the file exists and is no head set.
        OSError: the file cannot be written.
    """
    path = Path(text)
    if path.suffix != ".json":
        raise ValueError(f"--output {text!r} must end in .json")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {text!r} is a folder, or is in a folder that does not exist")
    if path.exists():
        try:
            HeadSet.load(path)
        except ValueError:
            raise ValueError(
                f"--output {text!r} exists and is no head set; name another file"
            ) from None
    check_writable(path)
    return path


def read_seeds(text: str) -> list[int]:
    """Read numbers and ranges of numbers.

    Raises:
        ValueError: the text is invalid.
    """
    seeds: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last or last - first >= MAX_SEEDS:
            raise ValueError(f"--seeds {text!r} must be numbers of at least 0, as in 0,1,2 or 0-4")
        seeds += range(first, last + 1)
    return seeds


def read_heads(name: str, text: str | None) -> Any:
    """Read the heads of an option, or None.

    Raises:
        ValueError: the text is invalid.
    """
    if text is None:
        return None
    try:
        return parse_heads(text)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None


def default_objective(model: str) -> Objective:
    """Return the objective of the scorer that a model's ``visattn_shapes.json`` names.

    Raises:
        ValueError: the file names no scorer or an unknown one, or cannot be read.
    """
    name = read_scorer_name(model)
    if name is None:
        raise ValueError(
            f"--objective is needed: model {model!r} names no scorer; give MODULE:FUNCTION as in "
            "mine.scores:aesthetic"
        )
    if name not in OBJECTIVES:
        raise ValueError(
            f"{SHAPES_FILE} of model {model!r} names the scorer {name!r}; it must be "
            f"{' or '.join(OBJECTIVES)}"
        )
    return OBJECTIVES[name]


def read_objective(text: str) -> Objective:
    """Import an objective by its name; modules of the working folder can be imported too.

    Raises:
        ValueError: the name is invalid, or cannot be imported.
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
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except Exception as error:  # code of the caller raises errors of any type
        raise ValueError(
            f"--objective {text!r} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"--objective {text!r} is no function; name a callable")
    return function  # type: ignore[no-any-return]
