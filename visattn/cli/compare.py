"""``visattn compare``: the difference of two outputs, or of the outputs of two plans."""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from visattn._atomic import check_writable, write_whole
from visattn.cli.compare_page import page_of
from visattn.cli.generation_options import (
    add_job_arguments,
    add_model_arguments,
    given_options,
    job_fields,
    read_loading,
    read_one_plan,
)
from visattn.generation import Job, load_pipeline, run_job
from visattn.generation.job import FPS
from visattn.generation.silence_logs import quiet
from visattn.inject import sparse, summary
from visattn.metrics import Comparison, compare_frames
from visattn.plan.show.columns import aligned, cell
from visattn.report import write_page
from visattn.runtime.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="A B | PROMPT",
        help="two outputs to compare, A is the reference (mp4, PNG, or folder of PNG files); or, "
        "with --model, a prompt to generate with --plan (A) and --plan-b (B) from the same noise",
    )
    parser.add_argument("--plan-b", metavar="PLAN", help="plan of B, in the same form as --plan")
    parser.add_argument(
        "--per-frame", action="store_true", help="print the numbers of every frame too"
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="OUT",
        help="FILE.html writes a page with both, FILE.json the numbers, FILE.mp4, FILE.png or a "
        "folder A and B side by side",
    )
    add_job_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> str:
    if args.output is not None:
        check_output(args.output)
    if args.model is None and args.plan_b is None:
        a, b, sides = read_pair(args)
    else:
        a, b, sides = generate_pair(args)
    if a.shape != b.shape:
        sizes = " and ".join(f"{t} frames of {h}x{w}" for t, h, w, _ in (a.shape, b.shape))
        raise ValueError(f"A and B have {sizes}; only equal shapes can be compared")
    comparison = compare_frames(b, a)
    numbers: dict[str, Any] = {
        **comparison.numbers(per_frame=args.per_frame),
        **dict(zip(("frames", "height", "width"), a.shape[:3], strict=True)),
        **sides,
    }
    text = json.dumps(numbers, indent=2, sort_keys=True, allow_nan=False)
    if args.output is not None:
        write_output(args, a, b, comparison, numbers, text)
    return text if args.json else report(comparison, numbers, args.per_frame)


def check_output(path: str) -> None:
    """Refuse an output that cannot be written, before the computation."""
    from visattn.media.video import check_target

    if Path(path).suffix.lower() not in (".json", ".html"):
        check_target(path)
    elif not Path(path).parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"--output {path!r} is a folder, or is in a folder that does not exist")
    else:
        check_writable(path)


def write_output(
    args: argparse.Namespace,
    a: torch.Tensor,
    b: torch.Tensor,
    comparison: Comparison,
    numbers: dict[str, Any],
    text: str,
) -> None:
    """Write the numbers, a page, or A and B side by side."""
    from visattn.media.video import read_rate, write_video

    if args.fps is not None:
        fps = float(args.fps)
    elif "settings" in numbers:  # the frame rate of the pipeline
        fps = float(numbers["settings"].get("fps", FPS))
    else:
        fps = read_rate(args.inputs[0]) or read_rate(args.inputs[1]) or FPS
    if Path(args.output).suffix.lower() == ".html":
        page = page_of(a, b, comparison, numbers, fps)
        write_page(page, args.output)
    elif Path(args.output).suffix.lower() == ".json":
        write_whole(args.output, f"{text}\n".encode())
    else:
        write_video(torch.cat([a, b], 2), args.output, fps=fps)


def read_pair(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return the frames of two outputs, and their paths as JSON values."""
    from visattn.media.video import read_video

    unused = [flag for flag in given_options(args) if flag != "--fps"]
    if unused:
        raise ValueError(f"{unused[0]} is for generating: give --model, a prompt and --plan-b too")
    if len(args.inputs) != 2:
        raise ValueError(f"give two outputs to compare, not {len(args.inputs)}, or --model")
    a, b = map(read_video, args.inputs)
    return a, b, {"a": {"path": args.inputs[0]}, "b": {"path": args.inputs[1]}}


def generate_pair(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Generate a prompt with two plans; return the frames, and times and settings as JSON
    values."""
    if len(args.inputs) != 1 or args.plan_b is None:
        raise ValueError("with --model give one prompt, and --plan-b with the plan of B")
    job = Job(prompt=args.inputs[0], **job_fields(args))
    loading, backend = read_loading(args), args.backend or "auto"
    texts = {"a": args.plan or "none", "b": args.plan_b}
    plans = {side: read_one_plan(text, loading, backend) for side, text in texts.items()}
    pipe = load_pipeline(loading)
    frames, sides = {}, {}
    for side, plan in plans.items():
        with quiet(), nullcontext() if plan is None else sparse(pipe, plan, backend=backend):
            result = run_job(pipe, job, progress=ProgressBar(side.upper(), every=True))
            numbers = None if plan is None else summary(pipe).numbers()
        frames[side] = result.frames
        steps = result.step_seconds
        sides[side] = {
            "plan": texts[side],
            "seconds": round(result.seconds, 4),
            "seconds_per_step": round(statistics.median(steps), 4) if steps else None,
            "summary": numbers,
            "notes": list(result.notes),
        }
    extra = {
        "prompt": job.prompt,
        "seed": job.seed,
        "model": loading.record(),
        "settings": result.settings,
        "backend": backend,
    }
    return frames["a"], frames["b"], {**sides, **extra}


def report(comparison: Comparison, numbers: dict[str, Any], per_frame: bool) -> str:
    """Return the comparison as text for a terminal."""
    lines = [_side(name, numbers[name.lower()]) for name in "AB"]
    for name in "ab":
        lines += [f"note: {name.upper()}: {note}" for note in numbers[name].get("notes", ())]
    flickers = (comparison.flicker.clip, comparison.reference_flicker.clip)
    lines += [
        f"{numbers['frames']} frames of {numbers['height']}x{numbers['width']}, B against A",
        f"PSNR       {cell(comparison.psnr.clip, '.2f')} dB",
        f"SSIM       {cell(comparison.ssim.clip, '.4f')}",
        f"max error  {cell(comparison.max_error.clip, '.4f')}",
        "flicker    {}, A {}".format(*(cell(value, ".4f") for value in flickers))
        + f", ratio {cell(comparison.flicker_ratio, '.3f')}",
    ]
    if per_frame:
        columns = ("frame", "PSNR", "SSIM", "max error", "flicker", "flicker of A")
        frames = zip(
            comparison.psnr.frames,
            comparison.ssim.frames,
            comparison.max_error.frames,
            comparison.flicker.frames,
            comparison.reference_flicker.frames,
            strict=True,
        )
        forms = (".2f", ".4f", ".4f", ".4f", ".4f")
        rows = [(str(t), *map(cell, values, forms)) for t, values in enumerate(frames)]
        lines += aligned([columns, *rows], numbers=len(columns))
    return "\n".join(lines)


def _side(name: str, side: dict[str, Any]) -> str:
    if "path" in side:
        return f"{name}  {side['path']}"
    step = side["seconds_per_step"]
    per_step = "" if step is None else f", {step:.3f} s a step"
    return f"{name}  {side['plan']}: {side['seconds']:.2f} s{per_step}"
