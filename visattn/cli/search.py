"""``visattn search``: find a plan for a pipeline, and write it with its receipt."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visattn._atomic import check_writable
from visattn.cli.generation_options import (
    add_job_arguments,
    add_model_arguments,
    job_fields,
    read_loading,
)
from visattn.cli.output import Output
from visattn.cli.prompt_options import add_prompt_arguments, read_prompts
from visattn.generation import load_pipeline
from visattn.generation.clip_shapes import SHAPES_FILE, read_scorer_name
from visattn.generation.prompts import read_prompt_lines
from visattn.generation.silence_logs import quiet
from visattn.metrics.caption_scorer import SCORERS
from visattn.runtime.processes import processes
from visattn.runtime.progress import ProgressBar

if TYPE_CHECKING:
    from visattn.search.measure.clip_quality import ClipScorer

KEPT = "kept"  # the folder of intermediate results, inside the output folder
UNUSED = ("plan", "backend", "compile", "image", "fps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_arguments(parser, "for the calibration")
    parser.add_argument(
        "--held-out",
        metavar="FILE",
        help="file of prompts for the validation (default: every second prompt)",
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="speedup of a whole generation, as in 1.35",
    )
    goal.add_argument(
        "--max-error",
        type=float,
        metavar="X",
        help="find the fastest plan with at most this relative error of the denoiser's output "
        "(default 0.05)",
    )
    goal.add_argument(
        "--min-psnr", type=float, metavar="DB", help="find the fastest plan with at least this PSNR"
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="time limit such as 90s, 10m or 2h, after which no further clip is validated",
    )
    parser.add_argument(
        "--phases",
        type=int,
        default=1,
        metavar="N",
        help="number of parts of the steps with different patterns (default 1)",
    )
    parser.add_argument(
        "--candidate",
        action="append",
        metavar="NAME",
        help="family or pattern to try; repeat for several (default: all)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=20,
        metavar="N",
        help="number of clips of the validation (default 20)",
    )
    parser.add_argument(
        "--output",
        "-o",
        required=True,
        metavar="FOLDER",
        help="folder of the plan, report.html, report.json and intermediate results; rerun the "
        "same command to resume; several processes share the work if started by torchrun "
        "--nproc_per_node N -m visattn search",
    )
    add_job_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the headline and claims as JSON")


def run(args: argparse.Namespace) -> Output:
    from visattn.search import Settings, search

    for name in UNUSED:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} cannot be used in a search; leave it out")
    if args.pairs < 1:
        raise ValueError(f"--pairs {args.pairs} must be at least 1")
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {args.output!r} is a file; name a folder")
    check_folder(folder)
    loading = read_loading(args)
    prompts, held_out = read_prompts(args, loading.model)
    if args.held_out is not None:
        held_out = read_prompt_lines(args.held_out)
    scorer = read_scorer(loading.model)
    fields = {k: v for k, v in job_fields(args).items() if k not in ("seed", "fps")}
    pipe = load_pipeline(loading)
    with quiet() as log_lines:
        result = search(
            pipe,
            prompts,
            call=fields,
            target_speedup=args.target_speedup,
            max_error=args.max_error,
            min_psnr=args.min_psnr,
            budget=args.budget,
            phases=args.phases,
            candidates=args.candidate,
            seeds=(args.seed or 0,),
            held_out=held_out,
            resume=folder / KEPT,
            settings=Settings(pairs=args.pairs),
            scorer=scorer,
            model=loading.model if args.model else "tiny-wan",
            command=f"visattn {shlex.join(sys.argv[1:])}" if sys.argv[1:] else None,
            progress=ProgressBar(),
        )
    if not processes().first:  # the first process writes and prints
        return Output("")
    page = result.save(folder)
    report = result.report
    failures = [f"{row['item']}: {row['error']}" for row in report["failures"]]
    if args.json:
        keys = ("title", "headline", "claims", "speed", "table", "notes", "failures", "time")
        numbers = {key: report[key] for key in keys} | {"page": str(page)}
        return Output(json.dumps(numbers, indent=2, sort_keys=True), tuple(failures))
    return Output(text_of(report, page, list(log_lines)), tuple(failures))


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before the search.

    Raises:
        OSError: the folder cannot be written.
    """
    place = folder / "report.json"
    while not place.parent.exists():
        place = place.parent
    check_writable(place)


def read_scorer(model: str) -> ClipScorer | None:
    """Return the scorer that a model's ``visattn_shapes.json`` names, or None.

    Raises:
        ValueError: it names an unknown scorer, or the file cannot be read.
    """
    name = read_scorer_name(model)
    if name is None:
        return None
    if name not in SCORERS:
        raise ValueError(
            f"{SHAPES_FILE} of model {model!r} names the scorer {name!r}; it must be "
            f"{' or '.join(SCORERS)}"
        )
    return SCORERS[name]


def text_of(report: dict[str, Any] | Any, page: Path, log_lines: list[str]) -> str:
    """Return the receipt as text for a terminal."""
    lines = [report["title"], ""]
    for tile in report["headline"]:
        note = f"  ({tile['note']})" if tile["note"] else ""
        lines.append(f"{tile['label']:<34}{tile['value']}{note}")
    lines.append("")
    words = {True: "holds", False: "does not hold", None: "undecided"}
    for claim in report["claims"]:
        lines.append(f"{words[claim['holds']]}: {claim['text']}: {claim['figures']}")
        if claim["cause"]:
            lines.append(f"    {claim['cause']}")
    lines += [f"note: {note}" for note in (*report["notes"], *log_lines)]
    return "\n".join([*lines, "", f"wrote {page}"])
