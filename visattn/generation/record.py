"""The JSON record of each output, with all settings and versions that produced it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visattn._atomic import read_limited, sha256_of, write_whole
from visattn._version import versions
from visattn.attention.choice import choose_backend
from visattn.generation.job import Job, Result
from visattn.generation.loading import Loading
from visattn.guidance.registry import present_text
from visattn.plan import Plan
from visattn.runtime.private_names import execution_device

__all__ = [
    "SCHEMA",
    "check_record_path",
    "make_record",
    "output_hash",
    "read_record",
    "record_path",
    "request_of",
    "write_record",
]

SCHEMA = "visattn.generation/1"
START = b'{\n  "backend": '  # the first bytes of every record
MOST_BYTES = 1 << 28  # size limit of a record: the largest plan, with one value on each line
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "imageio-ffmpeg")


def record_path(output: str | os.PathLike[str]) -> Path:
    """Return the path of the record of an output, in the same folder.

    Args:
        output: a file or a folder of frames.

    Returns:
        ``clip.mp4.json`` for ``clip.mp4``, ``frames.json`` for the folder ``frames``.

    Example:
        >>> from visattn.generation import record_path
        >>> record_path("clips/clip.mp4").name
        'clip.mp4.json'
    """
    target = Path(output)
    return target.with_name(f"{target.name}.json")


def request_of(
    job: Job, loading: Loading, plan: Plan | None, backend: str, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the request of a generation as JSON values. Two generations with the same request make
    the same frames on the same machine with the same versions. The request has no token.

    Args:
        job: the prompt and its options.
        loading: the pipeline.
        plan: the plan, or None.
        backend: the name of the backend.
        origin: the result of ``origin_of(loading)``.
    """
    return {
        "job": job.record(),
        "model": loading.record(),
        "origin": dict(origin),
        "plan": None if plan is None else json.loads(plan.to_json()),
        "backend": backend,
    }


def make_record(
    request: Mapping[str, Any],
    pipe: Any,
    result: Result,
    *,
    output: str | os.PathLike[str],
    summary: Mapping[str, Any] | None,
    load_seconds: float,
) -> dict[str, Any]:
    """Return the record of a result as JSON values.

    Args:
        request: the request, of ``request_of``.
        pipe: the pipeline that ran.
        result: the result of ``run_job``.
        output: the file or folder of the frames; only its name is recorded.
        summary: the numbers of ``visattn.inject.summary``, or None without a plan.
        load_seconds: the seconds that it took to load the pipeline.
    """
    device = torch.device(execution_device(pipe) or pipe.device)
    return {
        "schema": SCHEMA,
        **request,
        "settings": result.settings,
        "pipeline": _describe(pipe),
        "summary": summary,
        "output": {
            "name": Path(output).name,
            "frames": result.frames.shape[0],
            "height": result.frames.shape[1],
            "width": result.frames.shape[2],
            "sha256_of_float32_frames": hashlib.sha256(result.frames.numpy().tobytes()).hexdigest(),
        },
        "device": _device_words(device),
        "backend_chosen": choose_backend(
            request["backend"], torch.empty(1, 1, 1, 64, device=device)
        )._asdict(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "seconds": {
            "load": round(load_seconds, 4),
            "generate": round(result.seconds, 4),
            "steps": [round(value, 4) for value in result.step_seconds],
        },
        "notes": list(result.notes),
    }


def write_record(output: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write the record of an existing output atomically and return its path.

    Raises:
        OSError: the record cannot be written.
    """
    path = record_path(output)
    whole = {**record, "output": {**record["output"], "sha256": output_hash(output)}}
    text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False, default=str)
    write_whole(path, f"{text}\n".encode())
    return path


def read_record(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the record of an output.

    Args:
        output: the file or folder of the frames.

    Returns:
        The record as JSON values, or None if there is no valid record.

    Example:
        >>> from visattn.generation import read_record
        >>> read_record("clip.mp4") is None
        True
    """
    try:
        value = json.loads(read_limited(record_path(output), MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return None
    job = value.get("job")
    if isinstance(job, dict) and isinstance(texts := job.get("guidance"), list):
        try:  # older versions wrote guidances in another form
            job["guidance"] = [present_text(text) for text in texts]
        except (AttributeError, ValueError):
            return value
    return value


def check_record_path(output: str | os.PathLike[str]) -> None:
    """Refuse to replace a file that is no record. A damaged record, which is empty, contains zeros
    or is truncated, may be replaced.

    Raises:
        ValueError: there is another file at the path of the record.
    """
    path = record_path(output)
    if not path.exists() or read_record(output) is not None:
        return
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(START))
        if START.startswith(start.rstrip(b"\0")) and not _is_json(path):
            return
    raise ValueError(f"{str(path)!r} exists and is no record of visattn; name another output")


def _is_json(path: Path) -> bool:
    try:
        json.loads(read_limited(path, MOST_BYTES))
    except (ValueError, RecursionError):
        return False
    return True


def output_hash(output: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 of an output (of the file, or of the names and contents of all frames), or
    None if it cannot be read."""
    target, sha256 = Path(output), hashlib.sha256()
    try:
        if target.is_file():
            return sha256_of(target)
        for path in sorted(target.iterdir()):
            sha256.update(f"{path.name} {sha256_of(path)} ".encode())
    except (OSError, ValueError):
        return None
    return sha256.hexdigest()


def _describe(pipe: Any) -> dict[str, Any]:
    """Return the class, the parts and the scheduler of a pipeline."""
    parts = {
        name: {
            "class": type(part).__name__,
            "dtype": str(getattr(part, "dtype", None)).removeprefix("torch."),
            "device": str(getattr(part, "device", None)),
        }
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    scheduler = getattr(pipe, "scheduler", None)
    return {
        "class": type(pipe).__name__,
        "parts": parts,
        "scheduler": None
        if scheduler is None
        else {"class": type(scheduler).__name__, "config": dict(scheduler.config)},
    }


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return str(device)
