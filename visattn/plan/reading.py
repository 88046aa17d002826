"""Strict reading of plan files: every value has its key, its type and its range, or one sentence
says what is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["Record", "parse_json"]

Json = dict[str, Any]


def parse_json(text: str, what: str) -> Json:
    """The object that a JSON text holds; a key may stand once, and NaN is no number.

    Raises:
        ValueError: the text is something else; the sentence calls it ``what``.
    """

    def once(pairs: list[tuple[str, Any]]) -> Json:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{what} holds the key {key!r} twice")
        return dict(pairs)

    def number(text: str) -> float:
        raise ValueError(f"{what} holds {text}, which is no number of JSON")

    if not text.strip():
        raise ValueError(f"{what} is empty; a plan is a JSON object")
    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__}, not a JSON object")
    return value


class Record:
    """An object of the file: keys are taken out by type, and none may be left over."""

    def __init__(self, value: object, what: str, keys: tuple[str, ...]) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{what} must be an object, not {shown(value)}")
        for key in value:
            if key not in keys:
                close = difflib.get_close_matches(str(key), keys, n=1)
                guess = f", did you mean {close[0]!r}?" if close else ";"
                raise ValueError(f"{what} has the unknown key {key!r}{guess} its keys are "
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
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(key, "an integer of at least 0")
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
    """A value as it stands in a sentence, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
