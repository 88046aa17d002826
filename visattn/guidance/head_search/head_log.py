"""The log of a search for heads: a file of its scores, from which an interrupted search resumes.

The log is not a ``visattn.tasks.result_store.ResultStore``. Users name one file of JSON lines
(``resume="scores.jsonl"``), read it and delete single lines of it; the store has a folder with one
binary file for each result. A search has up to some million scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from visattn._arguments import is_number
from visattn._atomic import read_limited
from visattn.plan.json_format import parse_json, shown

__all__ = ["HeadLog", "Place"]

SCHEMA = "visattn.head_search/1"
REMEDY = "name another file to start a new log"
MOST_BYTES = 1 << 30  # some million scores


class Place(NamedTuple):
    """The set of heads, prompt and seed of a score.

    Attributes:
        among: name of the heads that are perturbed with the candidate, from ``HeadLog.name_of``.
        layer: path of the candidate's layer; None means there is no candidate.
        head: index of the candidate in the layer; None means there is no candidate.
        pair: index of the prompt and seed.
    """

    among: str
    layer: str | None
    head: int | None
    pair: int


class HeadLog:
    """A file of JSON lines: the settings of a search, then a line for each score or failure. A line
    is written as soon as the score is known, and the file is made with the first line. A last line
    that was cut off is ignored and overwritten.

    Args:
        path: of the file; None means scores are only in memory.
        settings: what the scores depend on, as JSON values.

    Attributes:
        key: hash of the settings.
        scores: scores, and the messages of failures, by place.

    Raises:
        OSError: the file cannot be read, or its folder is missing.
        ValueError: it is of other settings, or is no log.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings, allow_nan=False))
        self.key = _hash(self.settings)
        self.scores: dict[Place, float | str] = {}
        self._size = 0  # bytes of the complete lines
        self._file: int | None = None
        if self.path is None:
            return
        if self.path.exists():
            self._read(read_limited(self.path, MOST_BYTES))
        elif not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"resume={str(path)!r} is in a folder that does not exist; create the folder"
            )

    @staticmethod
    def name_of(heads: Mapping[str, Mapping[int, float]]) -> str:
        """Return a name for a set of heads; empty for no heads.

        Args:
            heads: strengths by head, by path of the layer.
        """
        strengths = {
            path: {str(head): strength for head, strength in of_layer.items()}
            for path, of_layer in heads.items()
            if of_layer
        }
        return _hash(strengths) if strengths else ""

    def get(self, place: Place) -> float | str | None:
        """Return a score, or the message of a failure; None means there is neither.

        Args:
            place: what the score is of.
        """
        return self.scores.get(place)

    def put(self, place: Place, value: float | str, round_: int) -> None:
        """Keep a score or the message of a failure.

        Args:
            place: what the score is of.
            value: the score or the message.
            round_: round of the search.

        Raises:
            OSError: the file cannot be written.
        """
        self.scores[place] = value
        if self.path is None:
            return
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, self._size)
            if not self._size:
                self._write(self._header)
        line = {"key": self.key, "round": round_, **place._asdict()}
        self._write(_line(line | {"error" if isinstance(value, str) else "score": value}))

    def close(self) -> None:
        """Close the file. A later ``put`` opens it again."""
        if self._file is not None:
            self._size = os.fstat(self._file).st_size
            os.close(self._file)
            self._file = None

    @property
    def _header(self) -> bytes:
        return _line({"schema": SCHEMA, "key": self.key, "settings": self.settings})

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        while data:
            data = data[os.write(self._file, data) :]

    def _read(self, data: bytes) -> None:
        lines = data.split(b"\n")
        cut_line = lines.pop()  # the bytes after the last end of a line
        if not lines and not self._header.startswith(cut_line):
            self._check({})
        for number, line in enumerate(lines, 1):
            what = f"line {number} of resume={str(self.path)!r}"
            try:
                value = parse_json(line.decode(), what)
            except ValueError as error:
                if number > 1 and number == len(lines):
                    break
                raise ValueError(f"{error}; {REMEDY}") from None
            if number == 1:
                self._check(value)
            else:
                self._keep(value, what)
            self._size += len(line) + 1

    def _check(self, first: Mapping[str, Any]) -> None:
        """Compare the first line with the settings."""
        schema, other = first.get("schema"), first.get("settings")
        if schema != SCHEMA or not isinstance(other, dict):
            raise ValueError(
                f"resume={str(self.path)!r} is no log of a search for heads of this version "
                f"({SCHEMA}); {REMEDY}"
            )
        for name in sorted({*other, *self.settings}):
            present, logged = self.settings.get(name), other.get(name)
            if present != logged:
                raise ValueError(
                    f"resume={str(self.path)!r} is of other settings: {name} is {shown(logged)} in "
                    f"the file and {shown(present)} in this search; {REMEDY}"
                )

    def _keep(self, value: Mapping[str, Any], what: str) -> None:
        score, error = value.get("score"), value.get("error")
        layer, head, pair = (value.get(name) for name in ("layer", "head", "pair"))
        is_place = (
            value.get("key") == self.key
            and isinstance(value.get("among"), str)
            and isinstance(pair, int)
            and (layer is None) == (head is None)
            and isinstance(layer, (str, type(None)))
            and isinstance(head, (int, type(None)))
        )
        is_score = is_number(score)
        if not is_place or is_score == isinstance(error, str):
            raise ValueError(f"{what} is no score of this search; {REMEDY}")
        if is_score and not math.isfinite(score):  # type: ignore[arg-type]
            raise ValueError(f"{what} has the score {score}; {REMEDY}")
        place = Place(value["among"], layer, head, value["pair"])
        self.scores.setdefault(place, error if isinstance(error, str) else float(score))  # type: ignore[arg-type]


def _line(value: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(value, sort_keys=True, allow_nan=False)}\n".encode()


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
