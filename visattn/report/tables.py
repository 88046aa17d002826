"""What was measured, as tables: of plans, of speeds, of stages, and of names and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from visattn.report.templating import render

__all__ = ["plans_html", "rows_html", "speeds_html", "stages_html"]

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of the table of plans.

    Args:
        key: of the rows.
        head: the heading.
        meaning: the tooltip of the heading.
        unit: text after each number.
        digits: decimals of each number; None prints three significant digits.
        words: whether the column holds text, not numbers.
    """

    key: str
    head: str
    meaning: str = ""
    unit: str = ""
    digits: int | None = None
    words: bool = False


COLUMNS = (
    Column("density", "density", "kept fraction of (query, key) pairs", "", 3),
    Column("executed", "executed", "share of the blocks that run", "", 3),
    Column("predicted", "predicted", "speedup by the cost model", "x", 2),
    Column("measured", "measured", "measured speedup", "x", 2),
    Column("error", "error", "of the output, teacher-forced"),
    Column("psnr", "PSNR, dB", "against the dense video", "", 1),
    Column("against", "chosen minus this, dB", "mean difference of PSNR, pair by pair", "", 2),
    Column("ssim", "SSIM", "against the dense video", "", 4),
    Column("flicker", "flicker", "change from frame to frame", "", 4),
    Column("flips", "flips", "verdicts of the scorer that changed", words=True),
    Column("note", "note", words=True),
    Column("pattern", "pattern", words=True),
)


def plans_html(rows: Sequence[Row], chosen: set[object]) -> Markup:
    """Return the table of plans; columns without a value are left out.

    Args:
        rows: of the table.
        chosen: names of the plans that were chosen.
    """
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
    return render("plans", columns=columns, rows=rows, chosen_names=chosen)


def speeds_html(rows: Sequence[Row]) -> Markup:
    """Return predicted and measured speedup, all rows on one axis."""
    keys = ("predicted", "measured", "low", "high")
    known = [float(row[key]) for row in rows for key in keys if row.get(key) is not None]
    low, high = min([1.0, *known]), max([1.0, *known])
    room = (high - low or 1.0) * 0.04

    def mark(style: str, begin: float, end: float | None = None) -> dict[str, Any]:
        left, right = (
            100 * (x - low + room) / (high - low + 2 * room)
            for x in (begin, begin if end is None else end)
        )
        return {"style": style, "left": round(left, 2), "width": round(right - left, 2)}

    lines = []
    for row in rows:
        predicted, measured = row.get("predicted"), row.get("measured")
        ends = [row[key] for key in ("low", "high") if row.get(key) is not None]
        marks = [mark("one", 1)]
        marks += [mark("span", *ends)] if len(ends) == 2 else []
        marks += [mark(key, row[key]) for key in keys[:2] if row.get(key) is not None]
        difference = None
        if predicted and measured is not None:
            difference = 100 * (measured / predicted - 1)
        lines.append({"name": row.get("name"), "marks": marks, "difference": difference,
                      **{key: row.get(key) for key in keys}})
    return render("speeds", rows=lines)


def rows_html(rows: Sequence[Row], keys: Sequence[str], name: str) -> Markup:
    """Return a plain table with a column for each key."""
    return render("rows", rows=rows, keys=keys, name=name)


def stages_html(rows: Sequence[Row]) -> Markup:
    """Return stages with a bar for the share of the time that each took."""
    total = sum(float(row.get("seconds") or 0) for row in rows)
    stages = [
        {
            "name": row.get("stage"),
            "width": round(100 * float(row.get("seconds") or 0) / (total or 1), 2),
            "seconds": row.get("seconds"),
        }
        for row in rows
    ]
    return render("stages", stages=[*stages, {"name": "all", "width": 0, "seconds": total}])
