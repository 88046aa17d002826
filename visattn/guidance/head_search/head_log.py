"""The scores of a search for heads, kept line by line, so that one that was ended goes on."""

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
MOST_BYTES = 1 << 30  # some million scores


class Place(NamedTuple):
    """What a score is of.

    Attributes:
        among: the heads that are perturbed besides, as ``HeadLog.name_of`` writes them.
        layer, head: the candidate; None for ``among`` alone.
        pair: number of the prompt and seed.
    """

    among: str
    layer: str | None
    head: int | None
    pair: int


class HeadLog:
    """A file of JSON lines: the settings of a search, then a line for each score or failure, which
    is written at once. It is made when the first one is there.

    Args:
        path: of the file; None keeps scores in memory alone.
        settings: that scores depend on, as JSON values.

    Raises:
        OSError: the file cannot be read, or its folder is missing.
        ValueError: it is of other settings, or is no such file. A last line that was cut off is
            left out, and is written over.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings, allow_nan=False))
        self.key = _hash(self.settings)
        self.found: dict[Place, float | str] = {}
        self._end = 0  # of the lines that are whole
        self._file: int | None = None
        if self.path is None:
            return
        if self.path.exists():
            self._read(read_limited(self.path, MOST_BYTES))
        elif not self.path.parent.is_dir():
            raise FileNotFoundError(f"resume={str(path)!r} lies in a folder that is not there")

    @staticmethod
    def name_of(heads: Mapping[str, Mapping[int, float]]) -> str:
        """A name for a set of heads; empty for none."""
        own = {path: {str(n): u for n, u in each.items()} for path, each in heads.items() if each}
        return _hash(own) if own else ""

    def get(self, place: Place) -> float | str | None:
        """A score, the sentence of a failure, or None where there is neither."""
        return self.found.get(place)

    def put(self, place: Place, value: float | str, round_: int) -> None:
        """Keep a score or the sentence of a failure.

        Raises:
            OSError: it cannot be written.
        """
        self.found[place] = value
        if self.path is None:
            return
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, self._end)
            if not self._end:
                self._write(self._header)
        line = {"key": self.key, "round": round_, **place._asdict()}
        self._write(_line(line | {"error" if isinstance(value, str) else "score": value}))

    def close(self) -> None:
        """Close the file; a further ``put`` opens it again."""
        if self._file is not None:
            self._end = os.fstat(self._file).st_size
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
        cut = lines.pop()  # what stands behind the last end of a line
        if not lines and not self._header.startswith(cut):
            self._check({})
        for number, line in enumerate(lines, 1):
            what = f"line {number} of resume={str(self.path)!r}"
            try:
                value = parse_json(line.decode(), what)
            except ValueError as error:
                if number > 1 and number == len(lines):
                    break
                raise ValueError(f"{error}; name another file to begin anew") from None
            if number == 1:
                self._check(value)
            else:
                self._keep(value, what)
            self._end += len(line) + 1

    def _check(self, first: Mapping[str, Any]) -> None:
        """Hold the first line against the settings."""
        remedy = "name another file to begin anew"
        schema, other = first.get("schema"), first.get("settings")
        if schema != SCHEMA or not isinstance(other, dict):
            raise ValueError(
                f"resume={str(self.path)!r} is no log of a search for heads of this version "
                f"({SCHEMA}); {remedy}"
            )
        for name in sorted({*other, *self.settings}):
            mine, its = self.settings.get(name), other.get(name)
            if mine != its:
                raise ValueError(
                    f"resume={str(self.path)!r} is of other settings: {name} is {shown(its)} there "
                    f"and {shown(mine)} here; {remedy}"
                )

    def _keep(self, value: Mapping[str, Any], what: str) -> None:
        score, error = value.get("score"), value.get("error")
        layer, head, pair = (value.get(name) for name in ("layer", "head", "pair"))
        fine = value.get("key") == self.key and isinstance(value.get("among"), str)
        fine = fine and isinstance(pair, int) and (layer is None) == (head is None)
        fine = fine and isinstance(layer, (str, type(None))) and isinstance(head, (int, type(None)))
        is_score = is_number(score)
        if not fine or is_score == isinstance(error, str):
            raise ValueError(
                f"{what} is no score of this search; name another file to begin anew"
            )
        if is_score and not math.isfinite(score):  # type: ignore[arg-type]
            raise ValueError(f"{what} has the score {score}; name another file to begin anew")
        place = Place(value["among"], layer, head, value["pair"])
        self.found.setdefault(place, error if isinstance(error, str) else float(score))  # type: ignore[arg-type]


def _line(value: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(value, sort_keys=True, allow_nan=False)}\n".encode()


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
