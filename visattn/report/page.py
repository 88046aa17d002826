"""The page: a report checked, its parts in order, styles, data and scripts in one document."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from visattn._atomic import write_whole
from visattn.report.clips import clips_html
from visattn.report.colors import symbols
from visattn.report.head_table import family_styles, head_data, heads_html
from visattn.report.markup import Html, joined, put
from visattn.report.sections import (
    claims_html,
    command_html,
    facts_html,
    front_data,
    front_html,
    headline_html,
    notes_html,
    plan_html,
    verdict_html,
)
from visattn.report.stencil_figure import stencil_data
from visattn.report.tables import plans_html, rows_html, speeds_html, stages_html

__all__ = ["SCHEMA", "render_page", "write_page"]

SCHEMA = "visattn.report/1"
KINDS = {"search": "Receipt of a search", "compare": "Receipt of a comparison"}
STRICT, READY = '"use strict";', 'document.documentElement.dataset.ready = "1";'
SCRIPTS = ("page", "clips", "heads", "front")
# One script runs, that with the hash, and no other; nothing may be fetched, from anywhere. Styles
# are inline, in attributes too, for which there is no hash.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src '{}'; img-src data:; "
    "media-src data: blob:; base-uri 'none'; form-action 'none'"
)
DOCUMENT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{}</title><link rel="icon" href="data:,">
<style>{}</style></head>
<body>{}<a class="skip" href="#main">To the figures</a>
<header><p class="kind">visattn <span>{}</span><button type="button" id="theme" hidden></button></p>
<h1>{}</h1><p class="about">{}</p></header>
<main id="main">{}{}<nav aria-label="Parts">{}</nav>
{}</main>
<footer><p>{}</p></footer><div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{}</script>
<script>{}</script></body></html>
"""
SECTION = """<section id="{0}" aria-labelledby="{0}-title"><h2 id="{0}-title">{1}</h2>
<p class="lede">{2}</p>{3}</section>
"""


def render_page(report: Mapping[str, Any]) -> str:
    """The whole HTML document of a report.

    Args:
        report: plain JSON values of schema ``visattn.report/1``; parts that are missing or empty
            are left out of the page.

    Raises:
        ValueError: the report has another schema or kind, no title, or a part that cannot be shown.
    """
    check(report)
    parts = [
        (name, title, put(SECTION, name, title, lede, content))
        for name, title, lede, content in sections(report)
    ]
    heads, claims, tiles = (report.get(key) or [] for key in ("heads", "claims", "headline"))
    data = {
        "heads": head_data(heads),
        "stencils": stencil_data(report.get("stencils") or []),
        "front": front_data(report.get("front") or []),
    }
    script = "".join([STRICT, *(f"{{{_resource(f'{name}.js')}}}" for name in SCRIPTS), READY])
    return put(
        DOCUMENT,
        Html(POLICY.format(_hash(script))),
        f"{report['title']} – visattn",
        Html(_resource("page.css") + family_styles(heads)),
        symbols(),
        KINDS[report["kind"]],
        report["title"],
        " · ".join(_about(report)),
        headline_html(tiles) if tiles else None,
        verdict_html(claims, report.get("failures") or []),
        joined(put('<a href="#{}">{}</a> ', name, title) for name, title, _ in parts),
        joined(html for *_, html in parts),
        "One file: it loads nothing, and sends nothing.",
        _embedded(data),
        Html(script),
    )


def write_page(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of a report, whole or not at all.

    Raises:
        ValueError: as ``render_page``.
        OSError: the file cannot be written.
    """
    write_whole(path, render_page(report).encode())


def check(report: Mapping[str, Any]) -> None:
    """Refuse what is no report that this version can show."""
    schema, kind, title = (report.get(key) for key in ("schema", "kind", "title"))
    if schema != SCHEMA:
        raise ValueError(f"the report has schema {schema!r}; this version shows {SCHEMA!r} only")
    if kind not in KINDS:
        known = " or ".join(map(repr, KINDS))
        raise ValueError(f"the report has kind {kind!r}; it must be {known}")
    if not isinstance(title, str) or not title:
        raise ValueError(f"the report has title {title!r}; it must be some text")


def sections(report: Mapping[str, Any]) -> list[tuple[str, str, str, Html]]:
    """Name, title, explanation and content of each part that the report has."""
    part = {key: value for key, value in report.items() if value}
    found: list[tuple[str, str, str, Html]] = []
    if "clips" in part:
        found.append(("clips", "Videos", "Side by side, in step.",
                      clips_html(part["clips"], part.get("settings", {}))))
    if "claims" in part:
        found.append(("claims", "Claims", "What was promised, and what was found.",
                      claims_html(part["claims"])))
    if "heads" in part:
        found.append(("heads", "Heads", "What each head runs: layers down, heads across. Select "
                      "one to see its pattern beside its attention.", heads_html(part["heads"])))
    if "front" in part:
        found.append(("front", "Speed and quality", "Up and to the right is better. Bars are "
                      "intervals.", front_html(part["front"])))
    if "table" in part:
        chosen = {row.get("name") for row in part.get("front", ()) if row.get("chosen")}
        found.append(("table", "Plans", "Density is the kept fraction of (query, key) pairs, "
                      "executed the share of blocks that run. A difference in bold has an interval "
                      "that leaves out 0.", plans_html(part["table"], chosen)))
    if "speed" in part:
        found.append(("speed", "Predicted and measured", "Speedup over dense; the dashed line is "
                      "1x. The ring is predicted, the dot measured, the bar its interval.",
                      speeds_html(part["speed"])))
    if "stability" in part:
        found.append(("stability", "Stability", "How far the search would choose the same again.",
                      rows_html(part["stability"], ("name", "value", "note"), "Stability")))
    if "failures" in part:
        found.append(("failures", "Failures", "What did not run, or ended early.",
                      rows_html(part["failures"], ("item", "error"), "Failures")))
    if "notes" in part:
        found.append(("notes", "Notes", "", notes_html(part["notes"])))
    if "time" in part:
        found.append(("time", "Time", "What the making of this page took.",
                      stages_html(part["time"])))
    groups = [("model", _model(part)), ("settings", part.get("settings", {})),
              ("machine", part.get("machine", {}))]
    if any(facts for _, facts in groups):
        found.append(("setup", "Setup", "", facts_html(groups)))
    if "command" in part:
        found.append(("command", "Command", "What made this page.", command_html(part["command"])))
    if "plan" in part:
        found.append(("plan", "Plan", "The chosen plan: JSON, for visattn.apply_plan.",
                      plan_html(part["plan"])))
    return found


def _model(part: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of the model and of the sequence."""
    model = part.get("model", {})
    facts = {"name": model["name"]} if model.get("name") else {}
    facts.update(model.get("denoisers") or {})
    facts.update({key: part[key] for key in ("layout", "grid") if key in part})
    return facts


def _about(report: Mapping[str, Any]) -> list[str]:
    """What the figures are of, in a few words."""
    machine = report.get("machine") or {}
    words = [(report.get("model") or {}).get("name"), report.get("layout"), machine.get("device")]
    return [str(word) for word in words if word]


def _resource(name: str) -> str:
    return files("visattn.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Of a script, as a policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _embedded(data: Any) -> Html:
    """JSON in which no character can end the script element."""
    text = json.dumps(_rounded(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Html(text)


def _rounded(value: Any) -> Any:
    """Numbers to five digits that count; what is no number becomes null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
