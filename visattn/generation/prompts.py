"""Prompts from text files, and the prompts in the folder of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from visattn._atomic import read_text
from visattn.plan.json_format import parse_json

__all__ = ["PROMPTS_FILE", "model_prompts", "read_prompt_lines"]

PROMPTS_FILE = "visattn_prompts.json"


def read_prompt_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read the prompts of a text file, one on each line. Empty lines are ignored.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no text, or contains no prompt.
    """
    text = read_text(path, "prompts file")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompts file {str(path)!r} is empty; write one prompt on each line")
    return prompts


def model_prompts(model: str | os.PathLike[str]) -> tuple[list[str], list[str]] | None:
    """Read the calibration prompts and the held-out prompts from ``visattn_prompts.json`` in the
    folder of a model; None if there is no such file.

    Raises:
        ValueError: the file is invalid.
    """
    path = Path(model) / PROMPTS_FILE
    if not path.is_file():
        return None
    value = parse_json(read_text(path, "prompts file"), f"prompts file {str(path)!r}")
    lists: list[Any] = [value.get(key) for key in ("calibration", "held_out")]
    if not all(isinstance(x, list) and x and all(isinstance(y, str) for y in x) for x in lists):
        raise ValueError(
            f"{str(path)!r} must contain the lists calibration and held_out of prompts"
        )
    return lists[0], lists[1]
