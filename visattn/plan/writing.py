"""Plan files as text whose line differences can be read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

from visattn.plan.json_format import Json

__all__ = ["written"]


def written(value: Json, by_line: Collection[str]) -> str:
    """An object as JSON: sorted keys, one on a line; of those in ``by_line`` the items of a list,
    or the keys of an object, on a line each."""
    lines = []
    for key, item in sorted(value.items()):
        brackets = "[]"
        rows = []
        if key in by_line and isinstance(item, Mapping):
            brackets = "{}"
            rows = [f"{_line(name)}: {_line(own)}" for name, own in sorted(item.items())]
        elif key in by_line:
            rows = [_line(own) for own in item]
        if rows:
            inside = ",\n".join(f"    {row}" for row in rows)
            lines.append(f"  {_line(key)}: {brackets[0]}\n{inside}\n  {brackets[1]}")
        else:
            lines.append(f"  {_line(key)}: {_line(item)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)
