"""Many generations with one pipeline: files of prompts, existing outputs, failures."""

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
    """A generation and its output.

    Attributes:
        label: where the item comes from, such as ``line 3``.
        output: the file or folder of the frames.
        job: the generation; None if the line could not be read.
        error: why the line could not be read.

    Example:
        >>> from pathlib import Path
        >>> from visattn.generation import Item, Job
        >>> Item("line 1", Path("clip.mp4"), Job("a cat")).job.seed
        0
    """

    label: str
    output: Path | None
    job: Job | None
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of an item.

    Attributes:
        item: the item.
        status: ``made``, ``kept`` (the output existed already) or ``failed``.
        error: why it failed.
        record: the record of the output, as JSON values.

    Example:
        >>> from visattn.generation import Item, Outcome
        >>> Outcome(Item("line 1", None, None), "failed", "it has no prompt").numbers()["error"]
        'it has no prompt'
    """

    item: Item
    status: Literal["made", "kept", "failed"]
    error: str | None = None
    record: Mapping[str, Any] | None = None

    def numbers(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
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
    """Return ``count`` copies of an item with consecutive seeds, and the seed in the name of the
    output, such as ``clip-seed7.mp4``; for a count of 1 the item itself.

    The copies run one after the other because some pipelines ignore ``num_videos_per_prompt``
    (CogVideoX sets it to 1).
    """
    if count == 1 or item.job is None or item.output is None:
        return [item]
    first, output = item.job, item.output
    jobs = [
        Job(**{**{key: getattr(first, key) for key in JOB_KEYS}, "seed": first.seed + number})
        for number in range(count)
    ]
    return [
        Item(item.label, output.with_name(f"{output.stem}-seed{job.seed}{output.suffix}"), job)
        for job in jobs
    ]


def read_prompts(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], defaults: Mapping[str, Any]
) -> list[Item]:
    """Read the generations of a JSONL file.

    Each line is a JSON object with ``prompt``, any other field of a ``Job``, and ``output``, a name
    inside ``folder``. The default output of line 1 is ``0001.mp4``, or ``0001.png`` if the line
    asks for one frame. Empty lines are ignored.

    Args:
        path: the JSONL file.
        folder: the folder of the outputs.
        defaults: fields of a ``Job`` for the lines that do not have them.

    Returns:
        An item for each line. If a line cannot be read, its item has an error and no job.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no text, is empty, or has no valid line.

    Example:
        >>> from pathlib import Path
        >>> from visattn.generation import read_prompts
        >>> _ = Path("prompts.jsonl").write_text('{"prompt": "a cat", "seed": 3}')
        >>> (item,) = read_prompts("prompts.jsonl", "clips", {"num_inference_steps": 20})
        >>> item.label, item.output.name, item.job.seed
        ('line 1', '0001.mp4', 3)
    """
    text = read_text(path, "prompts file")
    _check_lines(text, str(path))
    items, outputs = [], set[Path]()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        label = f"line {number}"
        try:
            job, output = _read_line(line, number, Path(folder), defaults)
            place = output.resolve()
            if place in outputs:
                raise ValueError(f"output {shown(str(output))} is that of an earlier line")
            outputs.add(place)
        except (TypeError, ValueError) as error:
            items.append(Item(label, None, None, str(error)))
        else:
            items.append(Item(label, output, job))
    if not items:
        raise ValueError(f"prompts file {str(path)!r} is empty; write one JSON object on each line")
    if all(item.job is None for item in items):
        raise ValueError(
            f"prompts file {str(path)!r} has no valid line; {items[0].label}: {items[0].error}"
        )
    return items


def _read_line(
    line: str, number: int, folder: Path, defaults: Mapping[str, Any]
) -> tuple[Job, Path]:
    if line.rstrip().endswith(","):
        raise ValueError("it ends in a comma; a line must be one JSON object")
    value = parse_json(line, "it")
    for key in value:
        if key not in (*JOB_KEYS, "output"):
            names = ", ".join(JOB_KEYS)
            raise ValueError(f"it has the unknown key {shown(key)}; keys are {names}, output")
    if value.get("prompt") is None:
        raise ValueError("it has no prompt")
    output = value.pop("output", None)
    job = Job(**{**defaults, **{key: field for key, field in value.items() if field is not None}})
    if output is None:
        output = f"{number:04d}.{'png' if job.num_frames == 1 else 'mp4'}"
    if not isinstance(output, str) or not output.strip("/"):
        raise TypeError(f"output={shown(output)} must be the name of a file or folder")
    if not output.isprintable():
        raise ValueError(f"output={shown(output)} must be a name of printable characters")
    if Path(output).is_absolute() or ".." in Path(output).parts:
        raise ValueError(f"output={shown(output)} must be a name inside the output folder")
    if not (folder / output).parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"output={shown(output)} is a link that leads out of the output folder")
    return job, folder / output


def _check_lines(text: str, path: str) -> None:
    """Refuse a JSON array, or JSON over several lines, with one error for the whole file."""
    first = next((line.strip() for line in text.split("\n") if line.strip()), "")
    with suppress(ValueError, RecursionError):
        if first == "{" or isinstance(json.loads(text), list):
            first = "["
    if first == "[":
        raise ValueError(
            f"prompts file {path!r} is JSON over several lines, or a JSON array; write one JSON "
            "object on each line, without commas between them; `jq -c '.[]'` converts an array"
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
    """Generate items in order with one pipeline.

    The pipeline is loaded when the first item needs it.

    Args:
        items: the items, for example of ``read_prompts``.
        loading: the pipeline to load.
        plan: the plan of the pipeline; None for dense attention.
        backend: the backend of sparse attention.
        skip_existing: whether to keep an existing output that is unchanged and whose record has the
            same request: the same options, and the same files of the model and the adapters.
        keep_going: whether to continue with the other items when one fails. Otherwise the error is
            raised.
        new_folders: whether to make missing folders of outputs.
        progress: called with each item; returns the function that is called after its steps.

    Returns:
        The outcome of each item.

    Raises:
        TypeError: an item failed.
        ValueError: the pipeline cannot be loaded, the plan is for another one, or an item failed.
        OSError: a file cannot be read or written.
        BackendUnavailable: the backend cannot run on the device.
        GenerationError: an item failed.

    Example:
        >>> from visattn.generation import Item, Loading, generate_all
        >>> unreadable = Item("line 1", None, None, "it has no prompt")
        >>> (outcome,) = generate_all([unreadable], Loading("folder/of/a/model"), None)
        >>> outcome.status
        'failed'
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
        except Exception as error:  # the other items are still generated
            if not keep_going:
                raise
            outcomes.append(Outcome(item, "failed", sentence(error)))
            continue
        session.load()  # an error here concerns all items
        try:
            record = session.generate(item, None if progress is None else progress(item))
            outcomes.append(Outcome(item, "made", record=record))
        except Exception as error:  # the other items are still generated
            if not keep_going:
                raise
            outcomes.append(Outcome(item, "failed", sentence(error)))
    return outcomes


def _hash_in(record: Mapping[str, Any]) -> str:
    """Return the hash of the output in a record, or an empty text if it has none."""
    output = record.get("output")
    sha256 = output.get("sha256") if isinstance(output, Mapping) else None
    return sha256 if isinstance(sha256, str) else ""


class _Session:
    """A pipeline that is loaded once and runs many jobs."""

    def __init__(
        self, loading: Loading, plan: Plan | None, backend: str, new_folders: bool
    ) -> None:
        self.loading, self.plan, self.backend = loading, plan, backend
        self.new_folders = new_folders
        self.pipe: Any = None
        self.load_seconds = 0.0
        self.notes: list[str] = []

    def request(self, job: Job) -> dict[str, Any]:
        request = request_of(job, self.loading, self.plan, self.backend, self.origin)
        plain: dict[str, Any] = json.loads(json.dumps(request))
        return plain

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """The hashes of the files of the pipeline, computed once before it is loaded."""
        return origin_of(self.loading)

    def prepare(self, item: Item, skip_existing: bool) -> Mapping[str, Any] | None:
        """Return the record of an output that can be kept; otherwise check that it can be
        written."""
        from visattn.media.video import check_target, read_picture

        assert item.job is not None and item.output is not None
        if item.job.image is not None:
            read_picture(item.job.image)
        record = read_record(item.output) if skip_existing and item.output.exists() else None
        if record is not None:
            request = self.request(item.job)
            same = {key: record.get(key) for key in request} == request
            if same and _hash_in(record) == output_hash(item.output):
                return record
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
        """Apply the plan to the pipeline and return the log lines."""
        with quiet() as log_lines:
            if self.plan is not None:
                apply_plan(pipe, self.plan, backend=self.backend)
        return log_lines

    def generate(self, item: Item, progress: Progress | None) -> Mapping[str, Any]:
        """Generate an item, write it and return its record."""
        from visattn.media.video import kind_of

        assert item.job is not None and item.output is not None
        request = self.request(item.job)
        if kind_of(item.output) == "png" and self.frames_of(item.job) > 1:
            raise ValueError(
                f"output {str(item.output)!r} can hold one frame only; give --num-frames 1, or "
                "name a folder or an .mp4 file"
            )
        log_lines = self.apply(self.pipe)  # for each item, so that its calls are counted from 0
        result = run_job(self.pipe, item.job, progress=progress)
        result = replace(result, notes=(*self.notes, *log_lines, *result.notes))
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
        """Return the number of frames that the pipeline will make: that of the job, or the default
        of the pipeline; 1 for an image."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get("num_frames")
        if parameter is None:
            return 1
        count = parameter.default if job.num_frames is None else job.num_frames
        return count if isinstance(count, int) else 2

    def _write(self, output: Path, result: Result, record: Mapping[str, Any]) -> None:
        from visattn.media.video import write_video

        if self.new_folders:
            output.parent.mkdir(parents=True, exist_ok=True)
        record_path(output).unlink(missing_ok=True)  # the record of the previous frames
        write_video(result.frames, output, fps=result.settings.get("fps", FPS))
        write_record(output, record)
