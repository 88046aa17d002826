"""The JSON file beside each output, with everything that made it."""

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
START = b'{\n  "backend": '  # of every record
MOST_BYTES = 1 << 28  # of a record: a plan of the most bytes, a value on each line
PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "imageio-ffmpeg")


def record_path(output: str | os.PathLike[str]) -> Path:
    """Where the record of an output lies: ``clip.mp4.json`` beside ``clip.mp4``, ``frames.json``
    beside the folder ``frames``."""
    target = Path(output)
    return target.with_name(f"{target.name}.json")


def request_of(
    job: Job, loading: Loading, plan: Plan | None, backend: str, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """What was asked for, as JSON values: two generations with the same request make the same
    frames on the same machine with the same versions. The token is not in it.

    Args:
        origin: of ``origin_of(loading)``.
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
    """The record of a result, as JSON values.

    Args:
        request: of ``request_of``; pipe: the pipeline that ran; result: of ``run_job``.
        output: where the frames were written; only its name is recorded.
        summary: the numbers of ``visattn.inject.layer_summary``, or None without a plan.
        load_seconds: that loading the pipeline took.
    """
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.device)
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
    """Write the record beside its output, which is there, whole or not at all; its path.

    Raises:
        OSError: it cannot be written.
    """
    path = record_path(output)
    whole = {**record, "output": {**record["output"], "sha256": output_hash(output)}}
    text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False, default=str)
    write_whole(path, f"{text}\n".encode())
    return path


def read_record(output: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record beside an output, or None where there is none that can be read."""
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
    """Refuse to write the record of an output over something else. A record that is damaged, so
    that it is empty, holds zeros or ends early, may be written over.

    Raises:
        ValueError: there is something else.
    """
    path = record_path(output)
    if not path.exists() or read_record(output) is not None:
        return
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(START))
        if START.startswith(start.rstrip(b"\0")) and not _is_json(path):
            return
    raise ValueError(f"{str(path)!r} is there and is no record of visattn; name another output")


def _is_json(path: Path) -> bool:
    try:
        json.loads(read_limited(path, MOST_BYTES))
    except (ValueError, RecursionError):
        return False
    return True


def output_hash(output: str | os.PathLike[str]) -> str | None:
    """The SHA-256 of an output: of its file, or of the names and contents of its frames; None where
    it cannot be read."""
    target, found = Path(output), hashlib.sha256()
    try:
        if target.is_file():
            return sha256_of(target)
        for path in sorted(target.iterdir()):
            found.update(f"{path.name} {sha256_of(path)} ".encode())
    except (OSError, ValueError):
        return None
    return found.hexdigest()


def _describe(pipe: Any) -> dict[str, Any]:
    """Class, scheduler and parts of a pipeline."""
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
