"""``visattn inspect``: the attention of the heads of a pipeline, as a table and as pictures."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from visattn.cli.generation_options import (
    add_job_arguments,
    add_model_arguments,
    job_fields,
    read_loading,
    read_one_plan,
)
from visattn.cli.show import read_integers, read_query
from visattn.generation import Job, Loading, Result, load_pipeline, run_job
from visattn.generation.silence_logs import quiet
from visattn.geometry.orders import Triple
from visattn.inject import observe, sparse
from visattn.inject.models.denoisers import attention_layers, family_of, models_of
from visattn.plan.show.columns import aligned, cell
from visattn.readout import HeadReadout, Sampler
from visattn.readout.measures import FEW_TILES, WINDOW, check_window
from visattn.readout.tiles import MOST_TOKENS
from visattn.runtime.progress import ProgressBar

PASSES = ("cond", "uncond", "all")
SPREAD = 4  # number of steps that are read by default
# Columns of the table: name, field of Shares, meaning.
COLUMNS = (
    ("frame", "frame", "mass in the query's own frame"),
    ("place", "same_place", "mass at the query's place in the other frames"),
    ("window", "window", "mass in a window of {window} tokens around the query"),
    ("columns", "columns", "mass in the 1/64 of the keys that all queries share most"),
    ("text", "text", "mass in text tokens"),
    ("tiles", "tile_share", "share of the key tiles that hold 90 % of the mass"),
)


class Place(NamedTuple):
    """An attention layer of a pipeline."""

    role: str
    number: int
    path: str
    heads: int

    @property
    def name(self) -> str:
        return f"{self.role}.{self.path}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt", metavar="PROMPT", help="prompt of the generation that is inspected"
    )
    for name, kind, metavar, text in (
        ("layer", str, "LAYER", "layers by number or module path (default: all)"),
        ("head", int, "N", "heads (default: all)"),
        ("step", int, "N", f"denoising steps, from 0 (default: {SPREAD} of them, evenly spaced)"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, nargs="+", action="extend", metavar=metavar, help=text
        )
    parser.add_argument(
        "--pass",
        dest="pass_",
        choices=PASSES,
        default=PASSES[0],
        help="the pass of guidance (default %(default)s)",
    )
    parser.add_argument(
        "--query", metavar="t,h,w", help="the query of the picture of one head (default: middle)"
    )
    parser.add_argument(
        "--window",
        metavar="t,h,w",
        help="tokens of the window, odd (default {},{},{})".format(*WINDOW),
    )
    parser.add_argument(
        "--tile-size",
        type=int,
        default=MOST_TOKENS,
        metavar="N",
        help="most tokens of a tile (default %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=6,
        metavar="N",
        help="query tiles that are read, for each shape of tiles (default %(default)s)",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE.png",
        help="draw all heads, or the one that --layer and --head name, into this file",
    )
    add_job_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")


def run(args: argparse.Namespace) -> str:
    if args.output is not None:
        check_output(args.output)
    job = Job(prompt=args.prompt, **job_fields(args))
    options = read_options(args)
    Sampler(**options)  # refuses invalid options before the pipeline is loaded
    loading, backend = read_loading(args), args.backend or "auto"
    plan = read_one_plan(args.plan, loading, backend)
    pipe = load_pipeline(loading)
    places = choose_layers(pipe, args.layer)
    check_heads(places, args.head)
    one = args.output is not None and len(places) == 1 and len(set(args.head or ())) == 1
    if args.query is not None and not one:
        raise ValueError(
            "--query is for the picture of one head: give --output, one --head and one --layer"
            + (f", such as {places[0].name}" if len(args.layer or ()) == 1 else "")
        )
    if one and args.pass_ == "all":
        raise ValueError("--pass all is not for the picture of one head; choose a pass")
    total = count_steps(pipe, job)
    sampler = Sampler(
        **options,
        steps=choose_steps(total, args.step),
        layers=[(place.role, place.path) for place in places],
        keep_query=one,
    )
    with (
        quiet(),
        nullcontext() if plan is None else sparse(pipe, plan, backend=backend),
        observe(pipe, sampler, {place.path for place in places}),
    ):
        result = run_job(pipe, job, progress=ProgressBar(every=True))
    if not sampler.seen():
        raise ValueError(
            f"no attention of these layers was seen in pass {args.pass_} at the steps "
            f"{_listed(sampler.steps)} of {total}"
        )
    facts = read_facts(args, loading, job, sampler, result)
    if args.output is not None:
        draw(args.output, facts, sampler, result if one else None)
    if args.json:
        return json.dumps(numbers(facts, sampler), indent=2, sort_keys=True, allow_nan=False)
    lines = [] if args.output is None else [f"wrote {args.output}"]
    return "\n".join([*report(facts, sampler), *lines])


# ---- arguments


def check_output(path: str) -> None:
    """Refuse a picture that cannot be written, before the computation."""
    from visattn.media.video import check_target

    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"--output {path!r} must end in .png; no other format is written")
    check_target(path)


def read_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the sampler, without layers and steps."""
    return {
        "passes": None if args.pass_ == "all" else [args.pass_],
        "heads": args.head,
        "tile_size": args.tile_size,
        "tiles": args.samples,
        "window": WINDOW if args.window is None else read_window(args.window),
        "query": None if args.query is None else read_query(args.query),
        "per_step": True,
    }


def read_window(text: str) -> Triple:
    """``"3,5,5"``."""
    form = "odd numbers of frames, rows and columns as in 3,5,5"
    return check_window("window", read_integers(text, ",", "--window", form))


def choose_layers(pipe: Any, texts: Sequence[str] | None) -> list[Place]:
    """Return the layers of ``--layer``, or all."""
    known = [
        Place(role, number, path, int(module.heads))
        for role, model in models_of(pipe).items()
        if (family := family_of(model)) is not None
        for number, (path, module) in enumerate(attention_layers(model, family).items())
    ]
    if not known:
        raise ValueError(f"{type(pipe).__name__} has no denoiser of a known family")
    chosen = []
    for text in texts or ():
        matches = [p for p in known if text in (str(p.number), p.path, p.name)]
        if not matches:
            last = max(place.number for place in known)
            raise ValueError(
                f"--layer {text!r} does not exist; {type(pipe).__name__} has layers 0 to {last}, "
                f"such as {known[0].path} or {known[-1].name}"
            )
        chosen += matches
    return [place for place in known if texts is None or place in chosen]


def check_heads(places: Sequence[Place], heads: Sequence[int] | None) -> None:
    """Refuse heads that do not exist in a layer."""
    for place in places:
        for head in heads or ():
            if head >= place.heads:
                raise ValueError(
                    f"--head {head} does not exist; {place.path} of {place.role} has heads 0 to "
                    f"{place.heads - 1}"
                )


def count_steps(pipe: Any, job: Job) -> int:
    """Return the number of denoising steps of a job before it runs."""
    if job.num_inference_steps is not None:
        return job.num_inference_steps
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    if parameter is None or not isinstance(parameter.default, int):
        raise ValueError(f"give --num-inference-steps; {type(pipe).__name__} has no default")
    return parameter.default


def choose_steps(total: int, steps: Sequence[int] | None) -> list[int]:
    """Return the steps of ``--step``, or some evenly spaced ones."""
    for step in steps or ():
        if not 0 <= step < total:
            raise ValueError(f"--step {step} does not exist; the steps are 0 to {total - 1}")
    return sorted(set(steps or ((2 * n + 1) * total // (2 * SPREAD) for n in range(SPREAD))))


# ---- output


def read_facts(
    args: argparse.Namespace, loading: Loading, job: Job, sampler: Sampler, result: Result
) -> dict[str, Any]:
    """Return the settings of the measurement as JSON values."""
    sample = sampler.measures.sample
    return {
        "model": loading.record(),
        "job": job.record(),
        "settings": result.settings,
        "plan": args.plan,
        "backend": args.backend or "auto",
        "layout": str(sample.layout),
        "tokens": sample.layout.length,
        "grid": sample.grid.shape,
        "steps": sorted({line.step for line in sampler.table(by_step=True)}),
        "passes": sorted({key.pass_ for key in sampler.seen()}),
        "window": sampler.window,
        "tile_size": sampler.tile_size,
        "tiles": {
            tiles.tiling.name: {"of_sequence": len(tiles.blocks), "sampled": len(tiles.tiles)}
            for tiles in sample.samples
        },
        "query_rows": len(sample),
        "seconds": round(result.seconds, 4),
        "notes": list(result.notes),
    }


def numbers(facts: dict[str, Any], sampler: Sampler) -> dict[str, Any]:
    """Return all numbers as JSON values."""
    steps: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in sampler.table(by_step=True):
        steps.setdefault(_whose(line), []).append(
            {"step": line.step, "calls": line.calls, **line.shares.numbers()}
        )
    heads = []
    for line in sampler.table():
        values = line.numbers()
        del values["step"]
        heads.append({**values, "steps": steps[_whose(line)]})
    return {**facts, "uniform": sampler.chance.numbers(), "heads": heads}


def _whose(line: HeadReadout) -> tuple[Any, ...]:
    return line.role, line.number, line.pass_, line.head


def report(facts: dict[str, Any], sampler: Sampler) -> list[str]:
    """Return the table as lines for a terminal."""
    table, window = sampler.table(), "x".join(map(str, sampler.window))
    has_text = bool(sampler.measures.sample.layout.texts)
    columns = [column for column in COLUMNS if column[0] != "text" or has_text]
    groups = len({(line.role, line.pass_) for line in table}) > 1
    heads = [(_first(line, groups), line.shares) for line in table]
    rows = [("layer head", *(name for name, _, _ in columns), "shape")]
    for name, shares in (*heads, ("uniform", sampler.chance)):
        values = [getattr(shares, field) for _, field, _ in columns]
        rows.append((name, *map(cell, values), shares.tiling))
    few = sum(line.shares.tile_share <= FEW_TILES + 1e-9 for line in table)
    return [
        f"{facts['layout']}, {facts['tokens']} tokens, {facts['query_rows']} queries read",
        _when(facts),
        "",
        *aligned(rows, numbers=len(rows[0]) - 1),
        "",
        f"{few} of {len(table)} heads hold 90 % of their mass in {100 * FEW_TILES:.0f} % of the "
        f"tiles, of at most {facts['tile_size']} tokens",
        *(f"{name:<8} {text.format(window=window)}" for name, _, text in columns),
        "shape    shape of the tiles with the smallest share; uniform: equal attention to all keys",
        *(f"note: {note}" for note in facts["notes"]),
    ]


def _first(line: HeadReadout, groups: bool) -> str:
    """Return the first columns of a line."""
    numbers = f"{line.number:5d} {line.head:4d}"
    return f"{line.role} {line.pass_} {numbers}" if groups else numbers


def _when(facts: dict[str, Any]) -> str:
    """Return the steps and passes in words."""
    steps, total = facts["steps"], facts["settings"].get("num_inference_steps")
    words = f"step{'s' if len(steps) > 1 else ''} {_listed(steps)}"
    return f"{words}{'' if total is None else f' of {total}'}, pass {_listed(facts['passes'])}"


def _listed(values: Sequence[object] | None) -> str:
    return ", ".join(map(str, values or ()))


def draw(path: str, facts: dict[str, Any], sampler: Sampler, result: Result | None) -> None:
    """Draw all heads, or, with the result of a generation, the one head that was read."""
    from visattn.draw.canvas import save_png  # Pillow is loaded for pictures only
    from visattn.readout.detail import draw_detail
    from visattn.readout.overview import draw_overview

    name = facts["model"]["model"]
    if Path(name).is_dir():
        name = Path(name).resolve().name
    notes = [
        f'"{facts["job"]["prompt"]}", seed {facts["job"]["seed"]}',
        f"{facts['layout']}, {facts['tokens']} tokens; {_when(facts)}; {facts['query_rows']} "
        f"queries read; tiles of at most {facts['tile_size']} tokens"
        + ("" if facts["plan"] in (None, "none") else f"; plan {facts['plan']}"),
    ]
    if result is None:
        picture = draw_overview(sampler, title=f"Attention of {name}", notes=notes)
    else:
        (line,) = sampler.table()
        title = f"{line.layer}, head {line.head} of {name}"
        picture = draw_detail(sampler, line, title=title, notes=notes, video=result.frames)
    save_png(picture, path)
