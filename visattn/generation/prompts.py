"""Prompts from files: one a line, or those that lie beside a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from visattn._atomic import read_text
from visattn.plan.json_format import parse_json

__all__ = ["PROMPTS_FILE", "model_prompts", "read_prompt_lines"]

PROMPTS_FILE = "visattn_prompts.json"


def read_prompt_lines(path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        OSError: it cannot be read; ValueError: it is no text, or holds none.
    """
    text = read_text(path, "prompts file")
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise ValueError(f"prompts file {str(path)!r} is empty; it holds a prompt a line")
    return found


def model_prompts(model: str | os.PathLike[str]) -> tuple[list[str], list[str]] | None:
    """Prompts to calibrate on and held-out ones, from ``visattn_prompts.json`` in a model's folder;
    None where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(model) / PROMPTS_FILE
    if not path.is_file():
        return None
    value = parse_json(read_text(path, "prompts file"), f"prompts file {str(path)!r}")
    lists: list[Any] = [value.get(key) for key in ("calibration", "held_out")]
    if not all(isinstance(x, list) and x and all(isinstance(y, str) for y in x) for x in lists):
        raise ValueError(f"{str(path)!r} must hold the lists calibration and held_out of prompts")
    return lists[0], lists[1]
