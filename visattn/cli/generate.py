"""``visattn generate``: a video from a prompt, or many from a file of prompts, which several
processes share (``torchrun --nproc_per_node N -m visattn generate --prompts FILE.jsonl ...``)."""

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
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what should be seen")
    parser.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="a JSON object a line: prompt, and any of negative_prompt, seed, height, width, "
        "num_frames, num_inference_steps, guidance_scale, guidance_scale_2, true_cfg_scale, fps, "
        "image, guidance, output; several processes share the lines, started as torchrun "
        "--nproc_per_node N -m visattn generate",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="OUT",
        help="FILE.mp4, FILE.png for one frame, or a folder for lossless PNG frames (default "
        f"{OUTPUT}); with --prompts the folder of all outputs. OUT.json beside it says all that "
        "made it",
    )
    parser.add_argument(
        "--num-videos-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="one after the other, with the seeds SEED, SEED + 1, ... (default 1)",
    )
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="keep an output that the same options made of the same model before, if it is whole",
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
    """Every process makes the items that are its own, and waits for the others, as what started
    them may end all when one of them ends with an error."""
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
    failures = [f"{own.item.label}: {own.error}" for own in outcomes if own.status == "failed"]
    elsewhere = any(group.gather(bool(failures)))
    if args.json:
        numbers = [outcome.numbers() for outcome in outcomes]
        return Output(json.dumps(numbers, indent=2, sort_keys=True), failures, elsewhere)
    lines = [line for outcome in outcomes for line in outcome_lines(outcome)]
    return Output("\n".join(lines), failures, elsewhere)


def read_items(args: argparse.Namespace) -> list[Item]:
    """What the command line asks for, one item for each output.

    Raises:
        TypeError, ValueError, OSError: it asks for nothing, or for what cannot be.
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
            raise ValueError(f"--output {args.output!r} must be a folder, for --prompts makes many")
        if not folder.parent.is_dir():
            raise ValueError(f"--output {args.output!r} lies in a folder that is not there")
        items = read_prompts(args.prompts, folder, _fields(args))
    return [own for item in items for own in seeded(item, args.num_videos_per_prompt)]


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a Job that the command line gives."""
    return job_fields(args) | {"guidance": parse_guidances(args.guidance)}


def guidance_list(as_json: bool) -> str:
    """The guidances that have a name."""
    found = listed_guidances()
    if as_json:
        return json.dumps(found, indent=2)
    blocks = [
        [
            f"{own['name']}: {own['summary']}",
            f'    --guidance "{own["example"]}"',
            f"    parameters: {', '.join(own['parameters'])}",
        ]
        for own in found
    ]
    return "\n".join(line for block in blocks for line in block)


def outcome_lines(outcome: Outcome) -> list[str]:
    """What is printed of an outcome; a failure stands on stderr."""
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
