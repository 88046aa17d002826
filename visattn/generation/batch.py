"""Many generations with one pipeline: a file of prompts, what is there already, and what fails."""

from __future__ import annotations

import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from visattn._atomic import read_text
from visattn.generation.errors import sentence
from visattn.generation.job import FPS, Job, Result, run_job
from visattn.generation.loading import Loading, load_pipeline, lora_notes
from visattn.generation.origin import origin_of
from visattn.generation.record import (
    check_record_path,
    make_record,
    output_hash,
    read_record,
    record_path,
    request_of,
    write_record,
)
from visattn.generation.silence_logs import quiet
from visattn.inject import apply_plan, summary
from visattn.plan import Plan
from visattn.plan.json_format import parse_json, shown
from visattn.runtime.progress import Progress

__all__ = ["Item", "Outcome", "generate_all", "read_prompts", "seeded"]

JOB_KEYS = tuple(field.name for field in fields(Job))


@dataclass(frozen=True)
class Item:
    """A generation and where its frames go; ``label`` is where it comes from, as in ``line 3``.

    ``job`` is None where the label's line could not be read, and ``error`` says why.
    """

    label: str
    output: Path | None
    job: Job | None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an item: made, kept because it was there, or failed with ``error``."""

    item: Item
    status: Literal["made", "kept", "failed"]
    error: str | None = None
    record: Mapping[str, Any] | None = None

    def numbers(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        item, record = self.item, self.record or {}
        output, job = record.get("output", {}), item.job
        return {
            "item": item.label,
            "status": self.status,
            "error": self.error,
            "output": None if item.output is None else str(item.output),
            "record": None if not record or not item.output else str(record_path(item.output)),
            "prompt": None if job is None else job.prompt,
            "seed": None if job is None else job.seed,
            "frames": [output[name] for name in ("frames", "height", "width")] if output else None,
            "seconds": record["seconds"]["generate"] if record else None,
            "notes": list(record.get("notes", ())),
        }


def seeded(item: Item, count: int) -> list[Item]:
    """The item, or for ``count`` above 1 as many of it with the seeds from its own on, each with
    its seed in the name of its output: ``clip-seed7.mp4``. They run one after the other, for not
    every pipeline heeds ``num_videos_per_prompt`` (CogVideoX sets it to 1 in its call)."""
    if count == 1 or item.job is None or item.output is None:
        return [item]
    own, output = item.job, item.output
    jobs = [
        Job(**{**{key: getattr(own, key) for key in JOB_KEYS}, "seed": own.seed + number})
        for number in range(count)
    ]
    return [
        Item(item.label, output.with_name(f"{output.stem}-seed{job.seed}{output.suffix}"), job)
        for job in jobs
    ]


def read_prompts(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], defaults: Mapping[str, Any]
) -> list[Item]:
    """The generations of a JSONL file: an object a line, with ``prompt``, any other field of a Job,
    and ``output``, a name inside ``folder``; without one, ``0001.mp4`` for line 1, or ``0001.png``
    where the line asks for one frame. Empty lines are left out.

    Args:
        path: of the file; folder: where outputs go; defaults: fields of the lines that lack them.

    Returns:
        An item for each line; one that cannot be read has its error and no job.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, holds no line, or not one that can be read.
    """
    text = read_text(path, "prompts file")
    _check_lines(text, str(path))
    items, taken = [], set[Path]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        label = f"line {number}"
        try:
            job, output = _read_line(line, number, Path(folder), defaults)
            place = output.resolve()
            if place in taken:
                raise ValueError(f"output {shown(str(output))} is that of an earlier line")
            taken.add(place)
        except (TypeError, ValueError) as error:
            items.append(Item(label, None, None, str(error)))
        else:
            items.append(Item(label, output, job))
    if not items:
        raise ValueError(f"prompts file {str(path)!r} is empty; it holds a JSON object a line")
    if all(item.job is None for item in items):
        raise ValueError(
            f"prompts file {str(path)!r} has no line that can be read; {items[0].label}: "
            f"{items[0].error}"
        )
    return items


def _read_line(
    line: str, number: int, folder: Path, defaults: Mapping[str, Any]
) -> tuple[Job, Path]:
    if line.rstrip().endswith(","):
        raise ValueError("it ends in a comma; a line is a JSON object and nothing else")
    value = parse_json(line, "it")
    for key in value:
        if key not in (*JOB_KEYS, "output"):
            names = ", ".join(JOB_KEYS)
            raise ValueError(f"it has the unknown key {shown(key)}; keys are {names}, output")
    if value.get("prompt") is None:
        raise ValueError("it has no prompt")
    output = value.pop("output", None)
    job = Job(**{**defaults, **{key: own for key, own in value.items() if own is not None}})
    if output is None:
        output = f"{number:04d}.{'png' if job.num_frames == 1 else 'mp4'}"
    if not isinstance(output, str) or not output.strip("/"):
        raise TypeError(f"output={shown(output)} must be the name of a file or folder")
    if not output.isprintable():
        raise ValueError(f"output={shown(output)} must be a name of printable characters")
    if Path(output).is_absolute() or ".." in Path(output).parts:
        raise ValueError(f"output={shown(output)} must be a name inside the output folder")
    if not (folder / output).parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output={shown(output)} leads out of the output folder by a link")
    return job, folder / output


def _check_lines(text: str, path: str) -> None:
    """Refuse JSON of other forms with one sentence for all of its lines."""
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    with suppress(ValueError, RecursionError):
        if first == "{" or isinstance(json.loads(text), list):
            first = "["
    if first == "[":
        raise ValueError(
            f"prompts file {path!r} holds JSON over several lines, or a JSON array; it must hold a "
            "JSON object a line, without commas between them, as `jq -c '.[]'` writes an array"
        )


def generate_all(
    items: Sequence[Item],
    loading: Loading,
    plan: Plan | None,
    *,
    backend: str = "auto",
    skip_existing: bool = False,
    keep_going: bool = False,
    new_folders: bool = False,
    progress: Callable[[Item], Progress] | None = None,
) -> list[Outcome]:
    """Generate items in their order with one pipeline, which is loaded when the first needs it.

    Args:
        items: of ``read_prompts``, or made by hand.
        loading, plan, backend: of the pipeline; plan None is dense.
        skip_existing: keep an output that is as it was written, with a record of the same request:
            the same options, and the same files of the model and the adapters.
        keep_going: let the other items go on when one fails; else its error is raised.
        new_folders: make the folders of outputs that are missing.
        progress: returns for an item the function that is called after each of its steps.

    Returns:
        What became of each item.

    Raises:
        ValueError, OSError, BackendUnavailable: the pipeline cannot be loaded, or the plan is not
            for it; or an item failed.
        TypeError, GenerationError: an item failed.
    """
    session = _Session(loading, plan, backend, new_folders)
    outcomes = []
    for item in items:
        if item.job is None or item.output is None:
            outcomes.append(Outcome(item, "failed", item.error))
            continue
        try:
            record = session.prepare(item, skip_existing)
            if record is not None:
                outcomes.append(Outcome(item, "kept", record=record))
                continue
        except Exception as error:  # the other items go on
            if not keep_going:
                raise
            outcomes.append(Outcome(item, "failed", sentence(error)))
            continue
        session.load()  # an error here is that of all items
        try:
            record = session.generate(item, None if progress is None else progress(item))
            outcomes.append(Outcome(item, "made", record=record))
        except Exception as error:  # the other items go on
            if not keep_going:
                raise
            outcomes.append(Outcome(item, "failed", sentence(error)))
    return outcomes


def _hash_in(record: Mapping[str, Any]) -> str:
    """The hash of the output that a record is of; no hash where it has none."""
    output = record.get("output")
    found = output.get("sha256") if isinstance(output, Mapping) else None
    return found if isinstance(found, str) else ""


class _Session:
    """A pipeline that is loaded once, and the requests that it serves."""

    def __init__(
        self, loading: Loading, plan: Plan | None, backend: str, new_folders: bool
    ) -> None:
        self.loading, self.plan, self.backend = loading, plan, backend
        self.new_folders = new_folders
        self.pipe: Any = None
        self.load_seconds = 0.0
        self.notes: list[str] = []

    def request(self, job: Job) -> dict[str, Any]:
        own = request_of(job, self.loading, self.plan, self.backend, self.origin)
        plain: dict[str, Any] = json.loads(json.dumps(own))
        return plain

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """What the pipeline is loaded from, read once before it is loaded."""
        return origin_of(self.loading)

    def prepare(self, item: Item, skip_existing: bool) -> Mapping[str, Any] | None:
        """The record of an item that need not be made; else its target is checked."""
        from visattn.media.video import check_target, read_picture

        assert item.job is not None and item.output is not None
        if item.job.image is not None:
            read_picture(item.job.image)
        found = read_record(item.output) if skip_existing and item.output.exists() else None
        if found is not None:
            request = self.request(item.job)
            same = {key: found.get(key) for key in request} == request
            if same and _hash_in(found) == output_hash(item.output):
                return found
        check_target(item.output, new_folders=self.new_folders)
        check_record_path(item.output)
        return None

    def load(self) -> None:
        if self.pipe is not None:
            return
        started = time.perf_counter()
        pipe = load_pipeline(self.loading)
        self.load_seconds = time.perf_counter() - started
        self.notes = lora_notes(pipe, self.loading)
        self.apply(pipe)  # a plan for another model fails all items
        self.pipe = pipe

    def apply(self, pipe: Any) -> list[str]:
        """Put the plan on the pipeline; what is said of it."""
        with quiet() as said:
            if self.plan is not None:
                apply_plan(pipe, self.plan, backend=self.backend)
        return said

    def generate(self, item: Item, progress: Progress | None) -> Mapping[str, Any]:
        """Make an item and write it; its record."""
        from visattn.media.video import kind_of

        assert item.job is not None and item.output is not None
        request = self.request(item.job)
        if kind_of(item.output) == "png" and self.frames_of(item.job) > 1:
            raise ValueError(
                f"{str(item.output)!r} holds one frame: give --num-frames 1, or name a folder or a "
                f"file .mp4"
            )
        said = self.apply(self.pipe)  # anew, so that the calls of this item are counted
        result = run_job(self.pipe, item.job, progress=progress)
        result = replace(result, notes=(*self.notes, *said, *result.notes))
        numbers = None if self.plan is None else summary(self.pipe).numbers()
        record = make_record(
            request,
            self.pipe,
            result,
            output=item.output,
            summary=numbers,
            load_seconds=self.load_seconds,
        )
        self._write(item.output, result, record)
        return record

    def frames_of(self, job: Job) -> int:
        """How many frames the pipeline will make, by the job or its own default; 1 of an image."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get("num_frames")
        if parameter is None:
            return 1
        count = parameter.default if job.num_frames is None else job.num_frames
        return count if isinstance(count, int) else 2

    def _write(self, output: Path, result: Result, record: Mapping[str, Any]) -> None:
        from visattn.media.video import write_video

        if self.new_folders:
            output.parent.mkdir(parents=True, exist_ok=True)
        record_path(output).unlink(missing_ok=True)  # it would be that of other frames
        write_video(result.frames, output, fps=result.settings.get("fps", FPS))
        write_record(output, record)
