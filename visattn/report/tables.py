"""What was measured, as tables: of plans, of speeds, of stages, and of names and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from visattn.report.colors import kind_mark
from visattn.report.markup import Html, figure, interval, joined, plain, put

__all__ = ["plans_html", "rows_html", "speeds_html", "stages_html"]

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of the table of plans; ``digits`` of ``None`` are three that count."""

    key: str
    head: str
    meaning: str = ""
    unit: str = ""
    digits: int | None = None


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
    Column("flips", "flips", "verdicts of the scorer that changed"),
    Column("note", "note"),
    Column("pattern", "pattern"),
)
WORDS = ("flips", "note", "pattern")


def _table(name: str, classes: str, heads: Iterable[Html], body: Iterable[Html]) -> Html:
    """A table that scrolls in its own frame where the page is too narrow for it."""
    return put(
        '<div class="scroll" role="region" aria-label="{0}" tabindex="0"><table class="data {1}">'
        "<thead><tr>{2}</tr></thead><tbody>{3}</tbody></table></div>",
        name,
        classes,
        joined(heads),
        joined(body),
    )


def _heads(*names: str, numbers: Sequence[str] = ()) -> list[Html]:
    return [
        put('<th scope="col"{}>{}</th>', Html(' class="num"') if name in numbers else None, name)
        for name in names
    ]


def plans_html(rows: Sequence[Row], chosen: set[object]) -> Html:
    """The table of plans; columns without a value are left out."""
    columns = [c for c in COLUMNS if any(row.get(c.key) is not None for row in rows)]
    heads = [put('<th scope="col">plan</th>')] + [
        put('<th scope="col" class="{}" title="{}">{}</th>',
            column.key if column.key in WORDS else "num", column.meaning, column.head)
        for column in columns
    ]
    body = (
        put('<tr{}><th scope="row" data-v="{}">{}{}<small>{}{}</small></th>{}</tr>',
            Html(' class="chosen"') if row.get("name") in chosen else None,
            row.get("name"),
            kind_mark(row.get("kind")),
            row.get("name"),
            row.get("kind"),
            put(", <b>chosen</b>") if row.get("name") in chosen else None,
            joined(_cell(row, column) for column in columns))
        for row in rows
    )
    return _table("Table of plans", "plans", heads, body)


def _cell(row: Row, column: Column) -> Html:
    value = row.get(column.key)
    if column.key in WORDS:
        return put('<td class="{}" data-v="{}" title="{}">{}</td>', column.key, value,
                   value if column.key == "pattern" else None, figure(value))
    low, high = row.get(f"{column.key}_low"), row.get(f"{column.key}_high")
    clear = column.key == "against" and low is not None and high is not None and low * high > 0
    return put('<td class="num{}" data-v="{}">{}{}</td>', " clear" if clear else "", value,
               figure(value, column.unit, column.digits), interval(low, high, column.digits))


def speeds_html(rows: Sequence[Row]) -> Html:
    """Predicted and measured speedup, all rows on one axis."""
    keys = ("predicted", "measured", "low", "high")
    known = [float(row[key]) for row in rows for key in keys if row.get(key) is not None]
    low, high = min([1.0, *known]), max([1.0, *known])
    room = (high - low or 1.0) * 0.04

    def mark(name: str, value: float, to: float | None = None) -> Html:
        left, right = (100 * (x - low + room) / (high - low + 2 * room)
                       for x in (value, value if to is None else to))
        return put('<i class="{}" style="left:{}%;width:{}%"></i>',
                   name, round(left, 2), round(right - left, 2))

    body = []
    for row in rows:
        first, second = row.get("predicted"), row.get("measured")
        ends = [row[key] for key in keys[2:] if row.get(key) is not None]
        marks = [mark("one", 1)]
        marks += [mark("span", *ends)] if len(ends) == 2 else []
        marks += [mark(key, row[key]) for key in keys[:2] if row.get(key) is not None]
        off = None if not first or second is None else 100 * (second / first - 1)
        body.append(
            put('<tr><th scope="row">{}</th><td class="track" aria-hidden="true"><div>{}</div></td>'
                '<td class="num">{}</td><td class="num">{}{}</td><td class="num">{}</td></tr>',
                row.get("name"), joined(marks), figure(first, "x", 2), figure(second, "x", 2),
                interval(row.get("low"), row.get("high"), 2), figure(off, " %", 1))
        )
    words = ("predicted", "measured", "off by")
    heads = _heads("plan", "", *words, numbers=words)
    return _table("Predicted and measured speedup", "tracks", heads, body)


def rows_html(rows: Sequence[Row], keys: Sequence[str], name: str) -> Html:
    """A plain table with a column for each key."""
    body = (
        put('<tr><th scope="row">{}</th>{}</tr>', figure(row.get(keys[0])),
            joined(put("<td>{}</td>", plain(row.get(key))) for key in keys[1:]))
        for row in rows
    )
    return _table(name, "plain", _heads(*keys), body)


def stages_html(rows: Sequence[Row]) -> Html:
    """Stages with a bar for the share of the time that each took."""
    total = sum(float(row.get("seconds") or 0) for row in rows)
    line = ('<tr><th scope="row">{}</th><td class="track" aria-hidden="true"><div>'
            '<i class="bar" style="width:{}%"></i></div></td><td class="num">{}</td></tr>')
    body = [
        put(line, row.get("stage"), round(100 * float(row.get("seconds") or 0) / (total or 1), 2),
            figure(row.get("seconds"), " s", 1))
        for row in rows
    ]
    body.append(put(line, "all", 0, figure(total, " s", 1)))
    heads = _heads("stage", "", "time", numbers=("time",))
    return _table("Time per stage", "tracks", heads, body)
