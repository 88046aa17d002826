"""The map of heads as tables that need no script, and the data for the script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from visattn.report.colors import Family, families_of
from visattn.report.templating import render

__all__ = ["family_styles", "head_data", "heads_html"]

PATTERN = 240  # characters that the page shows of a pattern; the plan has it whole
KEYS = ("role", "layer", "number", "head", "phase", "family", "density", "executed", "error",
        "seconds", "reason", "stability")
SIZES = ((8, "large"), (24, "medium"), (math.inf, "small"))  # of cells, by most heads of a layer

Heads = Sequence[Mapping[str, Any]]


class Cell(NamedTuple):
    """A head of the report in the table; ``head_index`` counts the heads of the report."""

    head: Mapping[str, Any]
    head_index: int
    family_number: int
    family: Family


def family_styles(heads: Heads) -> str:
    """Return the style sheet of the kinds of patterns of these heads."""
    return "".join(
        f".f{number}{{background:{family.color};color:{family.ink}}}"
        for number, family in enumerate(_families(heads))
    )


def head_data(heads: Heads) -> list[dict[str, Any]]:
    """Return what the script needs of each head, with long patterns cut."""
    return [{**{key: head.get(key) for key in KEYS}, "pattern": _cut(head)} for head in heads]


def _cut(head: Mapping[str, Any]) -> str:
    text = str(head.get("pattern") or "")
    more = len(text) - PATTERN
    return text if more <= 0 else f"{text[:PATTERN]} … and {more} characters more, in the plan"


def _family(head: Mapping[str, Any]) -> str:
    return str(head.get("family") or "unknown")


def _families(heads: Heads) -> list[Family]:
    return families_of(map(_family, heads))


def _columns(heads: Heads) -> int:
    return 1 + max(int(head["head"]) for head in heads)


def heads_html(heads: Heads) -> Markup:
    """Return a switch of colours and their legend, a panel for each role and phase, and room for
    the selected head."""
    families = _families(heads)
    names = [_family(head) for head in heads]
    legend = [
        {
            "number": number,
            "letters": family.letters,
            "name": family.name,
            "count": names.count(family.name),
        }
        for number, family in enumerate(families)
    ]
    numbers = {family.name: number for number, family in enumerate(families)}
    groups: dict[tuple[str, int], list[Cell]] = {}
    for index, (head, name) in enumerate(zip(heads, names, strict=True)):
        key = (str(head.get("role") or ""), int(head.get("phase") or 0))
        cell = Cell(head, index, numbers[name], families[numbers[name]])
        groups.setdefault(key, []).append(cell)
    has_phases = len({phase for _, phase in groups}) > 1
    panels = [
        _panel(f"{role}, phase {phase}" if has_phases else role, cells)
        for (role, phase), cells in sorted(groups.items(), key=lambda item: item[0])
    ]
    num_columns = _columns(heads)
    size = next(name for most, name in SIZES if num_columns <= most)
    return render("heads", legend=legend, panels=panels, size=size)


def _panel(name: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Return the rows of a panel: the cells of each layer by head, None where a head is missing."""
    num_columns = _columns([cell.head for cell in cells])
    rows: dict[int, dict[str, Any]] = {}
    for cell in cells:
        number = int(cell.head["number"])
        row = rows.setdefault(number, {"number": number, "cells": [None] * num_columns})
        row["path"] = cell.head.get("layer")
        row["cells"][int(cell.head["head"])] = {
            "index": cell.head_index,
            "family_number": cell.family_number,
            "family": cell.family.name,
            "letters": cell.family.letters,
            "density": cell.head.get("density"),
            "error": cell.head.get("error"),
        }
    ordered = [rows[number] for number in sorted(rows)]
    return {"name": name, "num_columns": num_columns, "rows": ordered}
