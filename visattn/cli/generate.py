"""``visattn generate``: a video from a prompt, or many from a file of prompts, whose lines several
processes can share (``torchrun --nproc_per_node N -m visattn generate --prompts FILE.jsonl
...``)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from visattn.cli.generation_options import (
    add_job_arguments,
    add_model_arguments,
    job_fields,
    read_loading,
    read_one_plan,
)
from visattn.cli.output import Output
from visattn.generation import Item, Job, Outcome, generate_all, read_prompts
from visattn.generation.batch import seeded
from visattn.guidance.registry import GUIDANCES, listed_guidances, parse_guidances
from visattn.runtime.processes import ProcessGroup, join
from visattn.runtime.progress import ProgressBar

OUTPUT = "visattn.mp4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text that describes the video")
    parser.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="file with a JSON object on each line: prompt, and any of negative_prompt, seed, "
        "height, width, num_frames, num_inference_steps, guidance_scale, guidance_scale_2, "
        "true_cfg_scale, fps, image, guidance, output; several processes share the lines if "
        "started by torchrun --nproc_per_node N -m visattn generate",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="OUT",
        help="FILE.mp4, FILE.png for one frame, or a folder for lossless PNG frames (default "
        f"{OUTPUT}); with --prompts the folder of all outputs. OUT.json records all settings "
        "and versions",
    )
    parser.add_argument(
        "--num-videos-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="number of videos, with the seeds SEED, SEED + 1, ... (default 1)",
    )
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="keep complete outputs that were made with the same options and the same model",
    )
    parser.add_argument(
        "--guidance",
        action="append",
        metavar="NAME(PARAMETERS)",
        help=f"guidance by edited attention, as in {GUIDANCES['SoftPAG'].example!r}; heads may be "
        "a file of search-heads; repeat it to combine",
    )
    parser.add_argument(
        "--list-guidance", action="store_true", help="print the names of guidances, with examples"
    )
    add_job_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")


def run(args: argparse.Namespace) -> str | Output:
    if args.list_guidance:
        return guidance_list(args.json)
    with join() as group:
        return generate_own(args, group)


def generate_own(args: argparse.Namespace, group: ProcessGroup) -> Output:
    """Generate the items of this process and wait for the other processes, because a launcher may
    end all processes when one of them ends with an error."""
    items = read_items(args)[group.process.rank :: group.process.world]
    loading = read_loading(args)
    backend = args.backend or "auto"
    plan = read_one_plan(args.plan, loading, backend)
    outcomes = generate_all(
        items,
        loading,
        plan,
        backend=backend,
        skip_existing=args.skip_existing,
        keep_going=args.prompts is not None,
        new_folders=args.prompts is not None,
        progress=lambda item: ProgressBar(item.label, every=True),
    )
    failures = [
        f"{outcome.item.label}: {outcome.error}"
        for outcome in outcomes
        if outcome.status == "failed"
    ]
    elsewhere = any(group.gather(bool(failures)))
    if args.json:
        numbers = [outcome.numbers() for outcome in outcomes]
        return Output(json.dumps(numbers, indent=2, sort_keys=True), failures, elsewhere)
    lines = [line for outcome in outcomes for line in outcome_lines(outcome)]
    return Output("\n".join(lines), failures, elsewhere)


def read_items(args: argparse.Namespace) -> list[Item]:
    """Return one item for each output that the arguments ask for.

    Raises:
        TypeError: an option is invalid.
        ValueError: an option is invalid, or there is no prompt.
        OSError: a file cannot be read.
    """
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("give either a prompt or --prompts FILE.jsonl")
    if args.num_videos_per_prompt < 1:
        raise ValueError(f"--num-videos-per-prompt {args.num_videos_per_prompt} must be at least 1")
    if args.prompts is None:
        job = Job(prompt=args.prompt, **_fields(args))
        items = [Item("", Path(args.output or OUTPUT), job)]
    else:
        if args.output is None:
            raise ValueError("--prompts needs --output with the folder of all outputs")
        folder = Path(args.output)
        if folder.suffix.lower() in (".mp4", ".png") or (folder.exists() and not folder.is_dir()):
            raise ValueError(
                f"--output {args.output!r} must be a folder: --prompts writes many files"
            )
        if not folder.parent.is_dir():
            raise ValueError(
                f"--output {args.output!r} is in a folder that does not exist; make it first"
            )
        items = read_prompts(args.prompts, folder, _fields(args))
    return [copy for item in items for copy in seeded(item, args.num_videos_per_prompt)]


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a Job from the arguments."""
    return job_fields(args) | {"guidance": parse_guidances(args.guidance)}


def guidance_list(as_json: bool) -> str:
    """Return the named guidances as text or JSON."""
    rows = listed_guidances()
    if as_json:
        return json.dumps(rows, indent=2)
    blocks = [
        [
            f"{row['name']}: {row['summary']}",
            f'    --guidance "{row["example"]}"',
            f"    parameters: {', '.join(row['parameters'])}",
        ]
        for row in rows
    ]
    return "\n".join(line for block in blocks for line in block)


def outcome_lines(outcome: Outcome) -> list[str]:
    """Return the lines that are printed for an outcome; failures are printed on stderr."""
    numbers = outcome.numbers()
    if outcome.status == "failed":
        return []
    if outcome.status == "kept":
        return [f"kept {numbers['output']}"]
    frames, height, width = numbers["frames"]
    size = f"{frames} frame{'s' if frames > 1 else ''} of {height}x{width}"
    return [
        f"wrote {numbers['output']}: {size} in {numbers['seconds']:.1f} s",
        *(f"note: {note}" for note in numbers["notes"]),
    ]
