"""``visattn bench pipeline``: times of a denoising step and a generation with plans."""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

import torch

from visattn.bench import WrongResult
from visattn.bench.architectures import ARCHITECTURES, Architecture, build, operations, skeleton
from visattn.bench.measure_pipeline import GenerationTime, StepTime, time_generation, time_step
from visattn.bench.timing import Time
from visattn.cli.env import version_of
from visattn.cli.machine import Machine, add_machine, at_least_one, read_machine
from visattn.cli.output import Output
from visattn.generation import Job, Loading, default_model, load_pipeline, shape_of
from visattn.generation.errors import reason
from visattn.generation.silence_logs import quiet
from visattn.plan import Plan, read_plan
from visattn.plan.show.columns import aligned, cell

CPU_MODELS = ("tiny-wan",)
GPU_MODELS = ("wan2.1-1.3b", "cogvideox-5b")
PLANS = ("neighborhood((0.5, 0.5, 0.5))", "top_blocks(0.25)")
# Limits on a CPU for the operations of a step and the bytes of weights: above them a step takes
# minutes, or the weights do not fit the memory of most machines.
MOST_OPERATIONS, MOST_BYTES = 1e12, 8e9
PROMPT = "a red square moves right over the night"
COLUMNS = (
    "density",
    "dense step",
    "attention",
    "plan step",
    "attention",
    "speedup (quartiles)",
    "predicted",
    "plan",
)


class Row(NamedTuple):
    """The times of a plan on a model; ``plan`` is the text of the option."""

    plan: str
    step: StepTime
    generation: GenerationTime | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "-m",
        nargs="+",
        action="extend",
        choices=ARCHITECTURES,
        metavar="NAME",
        help=f"one of {', '.join(ARCHITECTURES)}, with the published configuration and random "
        f"weights; tiny-wan is trained (default: {' '.join(CPU_MODELS)}; on a GPU "
        f"{' '.join(GPU_MODELS)})",
    )
    parser.add_argument(
        "--plan",
        nargs="+",
        action="extend",
        metavar="PLAN",
        help="a pattern such as 'radial(decay=0.2)', or a plan's file, folder or hub id (default: "
        f"{' '.join(map(repr, PLANS))})",
    )
    for name in ("height", "width", "num-frames"):
        parser.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{name.replace('-', ' ')} of the video (default: the model's)",
        )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="number of layers that run (default: all)"
    )
    parser.add_argument(
        "--generate", action="store_true", help="time whole generations too (tiny-wan only)"
    )
    add_machine(parser, repeats=5)


def run(args: argparse.Namespace) -> Output:
    machine = read_machine(args)
    at_least_one(args, "layers")
    names = args.model or (GPU_MODELS if machine.gpu else CPU_MODELS)
    if args.generate and not all(ARCHITECTURES[name].trained for name in names):
        raise ValueError(
            "--generate needs a whole pipeline, and only --model tiny-wan has one here"
        )
    models = {name: read_model(name, args, machine) for name in names}
    plans = {text: read_one(text) for text in args.plan or PLANS}
    for text, plan in plans.items():
        for denoiser in plan.denoisers.values():
            if args.layers is not None and denoiser.layers != args.layers:
                raise ValueError(
                    f"--layers {args.layers} runs a part of the model, but --plan {text} is for "
                    f"{denoiser.layers} layers; leave --layers out, or give a pattern"
                )
    results: dict[str, list[Row]] = {}
    failed: list[str] = []
    for name, architecture in models.items():
        try:
            with quiet():
                model = build(
                    architecture, layers=args.layers, dtype=machine.dtype, device=machine.device
                )
        except torch.OutOfMemoryError as error:
            failed.append(f"{name}: {out_of_memory(error)}")
            continue
        for text, plan in plans.items():
            try:
                with quiet():
                    step = time_step(architecture, model, plan, repeats=machine.repeats)
                    whole = generation(architecture, plan, args, machine) if args.generate else None
            except torch.OutOfMemoryError as error:
                failed.append(f"{name}, {text}: {out_of_memory(error)}")
            except (WrongResult, ValueError) as error:
                failed.append(f"{name}, {text}: {error}")
            else:
                results.setdefault(name, []).append(Row(text, step, whole))
        del model  # frees its memory before the next model is made
    if args.json:
        by_model = {name: numbers(models[name], rows) for name, rows in results.items()}
        return Output(json.dumps(where(machine) | {"models": by_model}, indent=2), failed)
    return Output(table(machine, models, results) if results else "", failed)


def read_model(name: str, args: argparse.Namespace, machine: Machine) -> Architecture:
    """Return a model at the size of the arguments.

    Raises:
        ValueError: the model does not accept the size, has fewer layers, or is too large for a CPU.
    """
    known = ARCHITECTURES[name]
    try:
        architecture = known.at(args.height, args.width, args.num_frames)
        if known.trained:
            if args.layers is not None:
                raise ValueError("--layers is for random weights, and this model is trained")
            return architecture
        model = skeleton(architecture, args.layers)
    except ValueError as error:
        raise ValueError(f"--model {name}: {error}") from None
    size = sum(p.numel() for p in model.parameters()) * machine.dtype.itemsize
    work = operations(architecture, model)
    if not machine.gpu and (size > MOST_BYTES or work > MOST_OPERATIONS):
        raise ValueError(
            f"--model {name} has {size / 1e9:.1f} GB of weights and a step of {work:.1e} "
            f"operations, where {MOST_BYTES / 1e9:.0f} GB and {MOST_OPERATIONS:.0e} are allowed on "
            "a CPU; use --layers, a smaller --height, --width and --num-frames, or --device cuda"
        )
    return architecture


def read_one(text: str) -> Plan:
    """Read a plan.

    Raises:
        TypeError: the plan is invalid.
        ValueError: there is no such plan, or it is dense.
        OSError: a file cannot be read.
    """
    plan = read_plan(text)
    if plan is None:
        raise ValueError(f"--plan {text} is dense, which every plan is compared with; leave it out")
    return plan


def out_of_memory(error: BaseException) -> str:
    return f"out of memory: {reason(error)}; use --layers, or a smaller size"


def generation(
    architecture: Architecture, plan: Plan, args: argparse.Namespace, machine: Machine
) -> GenerationTime:
    """Return the times of whole generations of the small model."""
    loading = Loading(default_model(), dtype=args.dtype or "auto", device=machine.device)
    size = {name: getattr(architecture, name) for name in ("height", "width", "num_frames")}
    job = Job(PROMPT, **shape_of(default_model()) | size)
    return time_generation(load_pipeline(loading), plan, job, repeats=machine.repeats)


def where(machine: Machine) -> dict[str, object]:
    """Return the device and the versions of the measurement."""
    return machine.where() | {"diffusers": version_of("diffusers")}


def numbers(architecture: Architecture, rows: list[Row]) -> dict[str, Any]:
    """Return the results of a model as JSON values."""
    values: dict[str, Any] = {
        name: getattr(architecture, name)
        for name in ("height", "width", "num_frames", "text", "trained")
    }
    values["all_layers"] = architecture.layers
    values["plans"] = {
        row.plan: {
            "step": row.step.numbers(),
            "generation": None if row.generation is None else row.generation.numbers(),
        }
        for row in rows
    }
    return values


def table(machine: Machine, models: dict[str, Architecture], results: dict[str, list[Row]]) -> str:
    """Return the times as text, with a table for each model."""
    lines = [", ".join(f"{name} {value}" for name, value in where(machine).items())]
    for name, rows in results.items():
        first, architecture = rows[0].step, models[name]
        weights = "trained" if architecture.trained else "random weights"
        part = "" if first.layers == architecture.layers else f" of {architecture.layers}"
        lines += [
            "",
            f"{name}, {weights}, {first.layers}{part} layers, {first.parameters / 1e6:.1f} M "
            f"parameters, {first.tokens} tokens; a step is {architecture.step_words}",
            *aligned([COLUMNS, *map(step_cells, rows)], numbers=len(COLUMNS) - 1),
        ]
        for row in rows:
            lines += [f"{row.plan}: {note}" for note in row.step.notes]
            lines += [] if row.step.dense_peak is None else [memory_line(row)]
            lines += [] if row.generation is None else [generation_line(row, row.generation)]
    return "\n".join(lines)


def step_cells(row: Row) -> tuple[str, ...]:
    """Return the cells of ``COLUMNS`` for a plan."""
    step = row.step
    return (
        cell(step.density),
        f"{step.dense.median:.3f} s",
        f"{step.share.median:.0%}",
        f"{step.planned.median:.3f} s",
        f"{step.planned_attention.median / step.planned.median:.0%}",
        speedup(step.speedup),
        "-" if step.predicted is None else f"{step.predicted:.2f}x",
        row.plan,
    )


def memory_line(row: Row) -> str:
    dense, planned = (
        f"{(value or 0) / 1e9:.2f} GB" for value in (row.step.dense_peak, row.step.planned_peak)
    )
    return f"{row.plan}: a step allocates {planned} at most, dense {dense}"


def generation_line(row: Row, whole: GenerationTime) -> str:
    return (
        f"{row.plan}: a generation takes {whole.planned.median:.2f} s, dense "
        f"{whole.dense.median:.2f} s, {speedup(whole.speedup)}"
    )


def speedup(time: Time) -> str:
    return f"{time.median:.2f}x ({time.low:.2f} to {time.high:.2f})"
