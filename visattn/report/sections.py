"""The smaller parts of the page: figures at the head, claims, facts, texts to copy."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from visattn.plan.hub import PLAN_FILE
from visattn.report.colors import KINDS, kind_class, kind_mark
from visattn.report.markup import Html, figure, joined, plain, put

__all__ = ["claims_html", "command_html", "facts_html", "front_data", "front_html", "headline_html",
           "notes_html", "plan_html", "verdict_html"]

Row = Mapping[str, Any]
# What may become of a claim: the style sheet's name, a sign, words.
HOLDS = {True: ("yes", "✓", "holds"), False: ("no", "✕", "does not hold"),
         None: ("open", "–", "not decided")}


def headline_html(tiles: Sequence[Row]) -> Html:
    """The figures that one reads first."""
    rows = joined(
        put("<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>", tile.get("label"),
            figure(tile.get("value")), tile.get("note"))
        for tile in tiles
    )
    return put('<dl class="headline" id="headline">{}</dl>', rows)


def verdict_html(claims: Sequence[Row], failures: Sequence[Row]) -> Html | None:
    """One line on how many claims hold, then those that do not, and what failed."""
    lines = []
    if claims:
        held, failed, open_ = (sum(claim.get("holds") is state for claim in claims)
                               for state in (True, False, None))
        rest = [f"{failed} {'does' if failed == 1 else 'do'} not"] if failed else []
        rest += [f"{open_} {'is' if open_ == 1 else 'are'} not decided"] if open_ else []
        words = ", ".join([f"{held} of {len(claims)} claims hold", *rest])
        lines.append(put('<p><a href="#claims">{}.</a></p>', words))
    for claim in claims:
        if claim.get("holds") is False:
            lines.append(put('<p class="no"><b>✕ does not hold</b> {} <span class="num">{}</span>'
                             "</p>", claim.get("text"), claim.get("figures")))
    if failures:
        words = "1 part failed" if len(failures) == 1 else f"{len(failures)} parts failed"
        lines.append(put('<p class="no"><a href="#failures"><b>{}.</b></a></p>', words))
    return put('<div class="verdict">{}</div>', joined(lines)) if lines else None


def claims_html(claims: Sequence[Row]) -> Html:
    """Each claim with what became of it, and why."""
    rows = []
    for claim in claims:
        name, sign, words = HOLDS.get(claim.get("holds"), HOLDS[None])
        cause = claim.get("cause")
        rows.append(
            put('<li class="{}"><b class="state"><i aria-hidden="true">{}</i> {}</b><div>{} '
                '<span class="num">{}</span>{}</div></li>', name, sign, words, claim.get("text"),
                claim.get("figures"), put("<p>{}</p>", cause) if cause else None)
        )
    return put('<ul class="claims">{}</ul>', joined(rows))


def front_html(front: Sequence[Row]) -> Html:
    """The switches and the legend of the chart, which a script draws."""
    kinds = [*KINDS, *sorted({str(row.get("kind")) for row in front} - set(KINDS))]
    present = [kind for kind in kinds if any(str(row.get("kind")) == kind for row in front)]
    legend = joined(put("<li>{} {}</li>", kind_mark(kind), kind) for kind in present)
    measured = [row for row in front if row.get("measured") is not None]
    ratio = any(row.get("psnr") is not None for row in front)
    switches = (
        ("up", "Up", ("psnr", "PSNR against dense"), ("error", "output error"), ratio),
        ("across", "Across", ("speed", "predicted speedup"), ("measured", "measured speedup"),
         bool(measured)),
    )
    fields = joined(
        put('<fieldset class="switch" hidden><legend>{}</legend>'
            '<label><input type="radio" name="{}" value="{}" checked> {}</label>'
            '<label><input type="radio" name="{}" value="{}"> {}</label></fieldset>',
            title, name, *first, name, *second)
        if both else put('<input type="hidden" name="{}" value="{}">', name,
                         "error" if name == "up" else "speed")
        for name, title, first, second, both in switches
    )
    return put(
        '<div class="aside">{}<ul class="legend marks">{}</ul></div><div class="chart" id="chart">'
        "<noscript>The chart is drawn by a script; its numbers are in the table.</noscript></div>",
        fields,
        legend,
    )


def front_data(front: Sequence[Row]) -> list[dict[str, Any]]:
    """What the chart shows of each plan."""
    keys = ("name", "kind", "speed", "measured", "error", "psnr", "psnr_low", "psnr_high",
            "chosen", "pattern")
    return [{**{key: row.get(key) for key in keys}, "mark": kind_class(row.get("kind"))}
            for row in front]


def facts_html(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> Html:
    """Names and values under a few heads."""
    return put('<div class="setup">{}</div>', joined(
        put('<div class="facts"><h3>{}</h3><dl>{}</dl></div>', title, joined(
            put("<dt>{}</dt><dd>{}</dd>", key, plain(value)) for key, value in facts.items()
        ))
        for title, facts in groups
        if facts
    ))


def notes_html(notes: Sequence[str]) -> Html:
    """A list of sentences."""
    return put('<ul class="notes">{}</ul>', joined(put("<li>{}</li>", note) for note in notes))


def command_html(command: str) -> Html:
    """A line to copy."""
    return put('<pre tabindex="0" aria-label="Command"><code>{}</code></pre>', command)


def plan_html(plan: Mapping[str, Any]) -> Html:
    """The plan as a file to keep; a script shows its text from the link."""
    text = json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    data = base64.b64encode(text.encode()).decode()
    return put(
        '<p><a id="plan-file" download="{}" href="data:application/json;base64,{}">Save {}</a> '
        '<small>{} kB</small></p><details hidden id="plan-text"><summary>Show it</summary>'
        '<pre tabindex="0" aria-label="Plan"><code></code></pre></details>',
        PLAN_FILE, data, PLAN_FILE, figure(len(text.encode()) / 1000),
    )
