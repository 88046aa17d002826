"""Strict reading and diffable writing of JSON files.

The reader checks the key, the type and the range of every value; its errors name the value.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from visattn._arguments import is_integer

__all__ = [
    "MAX_BYTES",
    "MAX_COUNT",
    "MAX_PARTS",
    "Json",
    "Record",
    "brief",
    "check_at_most",
    "check_values",
    "json_by_lines",
    "parse_json",
    "shown",
]

Json = dict[str, Any]
MAX_BYTES = 16 << 20  # of a file: forty layers of forty heads in four phases take less than one
MAX_DEPTH = 32
MAX_DIGITS = 4000  # Python refuses to read integers of a few more
MAX_COUNT = 1 << 20  # of steps, and the last number of a layer
MAX_PARTS = 1024  # layers of a denoiser, and heads of a layer


def parse_json(text: str, what: str) -> Json:
    """Parse a JSON object; duplicate keys and NaN are refused.

    Args:
        text: the JSON text.
        what: names the text in errors.

    Raises:
        ValueError: the text is no JSON object.
    """

    def once(pairs: list[tuple[str, Any]]) -> Json:
        value = dict(pairs)
        if len(value) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            key = next(key for key, count in counts.items() if count > 1)
            raise ValueError(f"{what} holds the key {shown(key)} twice")
        return value

    def constant(text: str) -> float:
        raise ValueError(f"{what} holds {text}, which is no number of JSON")

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise ValueError(
                f"{what} holds an integer of {len(text)} digits; at most {MAX_DIGITS} are allowed"
            )
        return int(text)

    def fraction(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{what} holds {shown(text)}, which is larger than any number")
        return value

    if len(text) > MAX_BYTES:
        raise ValueError(
            f"{what} has {len(text)} characters; at most {MAX_BYTES} are allowed, as an object of "
            "more takes gigabytes of memory"
        )
    if not text.strip():
        raise ValueError(f"{what} is empty; it must hold a JSON object")
    try:
        value = json.loads(
            text,
            object_pairs_hook=once,
            parse_constant=constant,
            parse_int=whole,
            parse_float=fraction,
        )
        deep = deeper(value, MAX_DEPTH)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"{what} is nested too deep; at most {MAX_DEPTH} levels are allowed")
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__}, not a JSON object")
    return value


def deeper(value: object, levels: int) -> bool:
    """Return whether lists and objects are nested deeper than ``levels``."""
    nodes = [value]
    for _ in range(levels):
        nodes = [
            item
            for node in nodes
            if isinstance(node, (list, tuple, Mapping))
            for item in (node.values() if isinstance(node, Mapping) else node)
        ]
    return any(isinstance(node, (list, tuple, Mapping)) for node in nodes)


def check_at_most(what: str, number: int, most: int) -> None:
    """Raise ValueError when a plan has more of something than a plan file may hold.

    Args:
        what: names what is counted.
        number: the count.
        most: the largest count that is allowed.
    """
    if number > most:
        raise ValueError(f"plan has {number} {what}; at most {most} are allowed")


def json_by_lines(value: Json, by_line: Collection[str]) -> str:
    """Return an object as JSON text with small line differences.

    Args:
        value: the object; its keys are sorted, one on a line.
        by_line: keys whose list items, or whose object keys, are on a line each.
    """
    lines = []
    for key, item in sorted(value.items()):
        brackets = "[]"
        rows = []
        if key in by_line and isinstance(item, Mapping):
            brackets = "{}"
            rows = [f"{_line(name)}: {_line(inner)}" for name, inner in sorted(item.items())]
        elif key in by_line:
            rows = [_line(inner) for inner in item]
        if rows:
            inside = ",\n".join(f"    {row}" for row in rows)
            lines.append(f"  {_line(key)}: {brackets[0]}\n{inside}\n  {brackets[1]}")
        else:
            lines.append(f"  {_line(key)}: {_line(item)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def check_values(name: str, values: object) -> None:
    """Raise ValueError unless ``values`` is a mapping of JSON values.

    Args:
        name: names the mapping in errors.
        values: the mapping.
    """
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{name}={shown(values)} must be a mapping whose keys are strings")
    try:
        json.dumps(dict(values), allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold JSON values only: {error}") from None
    levels = MAX_DEPTH - 1  # the plan itself is one level
    if deeper(values, levels):
        raise ValueError(f"{name} is nested too deep; at most {levels} levels are allowed")


class Record:
    """An object of a file, read key by key with checks of types.

    Args:
        value: the object.
        what: names the object in errors.
        keys: the keys that are allowed.
    """

    def __init__(self, value: object, what: str, keys: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{what} must be an object, not {shown(value)}")
        for key in value:
            if key not in keys:
                close = difflib.get_close_matches(str(key)[:100], keys, n=1)
                guess = f", did you mean {close[0]!r}?" if close else ";"
                raise ValueError(f"{what} has the unknown key {shown(key)}{guess} its keys are "
                                 f"{', '.join(keys)}")
        self.value: Mapping[str, Any] = value
        self.what = what

    def wrong(self, key: str, allowed: str) -> ValueError:
        return ValueError(f"{key} of {self.what} is {shown(self.value.get(key))}; "
                          f"it must be {allowed}")

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.value.get(key, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def needed_text(self, key: str) -> str:
        value = self.text(key)
        if value is None:
            raise ValueError(f"{self.what} lacks the key {key!r}")
        return value

    def count(self, key: str) -> int:
        value = self.value.get(key)
        if not is_integer(value) or not 0 <= value <= MAX_PARTS:
            raise self.wrong(key, f"an integer from 0 to {MAX_PARTS}")
        return value

    def sequence(self, key: str) -> list[Any]:
        value = self.value.get(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def mapping(self, key: str) -> Json:
        value = self.value.get(key, {})
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return value


def shown(value: object) -> str:
    """Return a value for a sentence, cut to a readable length."""
    text = repr(value[:60] if isinstance(value, (str, list, tuple)) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def brief(error: Exception) -> str:
    """Return the message of an error on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
