"""The page: checks a report and joins its parts, styles, data and scripts into one document."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from markupsafe import Markup

from visattn._atomic import write_whole
from visattn.report.clips import clips_html
from visattn.report.colors import MARKS
from visattn.report.head_table import family_styles, head_data, heads_html
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
from visattn.report.templating import render

__all__ = ["SCHEMA", "render_page", "write_page"]

SCHEMA = "visattn.report/1"
KINDS = {"search": "Receipt of a search", "compare": "Receipt of a comparison"}
STRICT, READY = '"use strict";', 'document.documentElement.dataset.ready = "1";'
SCRIPTS = ("receipt", "clips", "heads", "front")
# Only the script with this hash runs, and nothing may be fetched. Styles are inline, also in
# attributes, for which a policy has no hash.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src '{}'; img-src data:; "
    "media-src data: blob:; base-uri 'none'; form-action 'none'"
)


def render_page(report: Mapping[str, Any]) -> str:
    """Return the HTML document of a report.

    Args:
        report: plain JSON values of schema ``visattn.report/1``; parts that are missing or empty
            are left out of the page.

    Raises:
        ValueError: the report has another schema or kind, no title, or a part that cannot be shown.

    Example:
        >>> from visattn.report import render_page
        >>> report = {"schema": "visattn.report/1", "kind": "compare", "title": "two plans"}
        >>> render_page(report).splitlines()[0]
        '<!DOCTYPE html>'
    """
    check(report)
    heads, claims, tiles = (report.get(key) or [] for key in ("heads", "claims", "headline"))
    data = {
        "heads": head_data(heads),
        "stencils": stencil_data(report.get("stencils") or []),
        "front": front_data(report.get("front") or []),
    }
    script = "".join([STRICT, *(f"{{{_resource(f'{name}.js')}}}" for name in SCRIPTS), READY])
    style = _resource("receipt.css") + family_styles(heads)
    page = render(
        "receipt",
        policy=POLICY.format(_hash(script)),
        title=report["title"],
        style=Markup(style),
        marks=MARKS,
        kind=KINDS[report["kind"]],
        about=" · ".join(_about(report)),
        headline=headline_html(tiles) if tiles else None,
        verdict=verdict_html(claims, report.get("failures") or []),
        sections=sections(report),
        data=_embedded(data),
        script=Markup(script),
    )
    return f"{page}\n"


def write_page(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the page of a report atomically.

    Args:
        report: as for ``render_page``.
        path: of the HTML file.

    Raises:
        ValueError: as ``render_page``.
        OSError: the file cannot be written.

    Example:
        >>> from visattn.report import write_page
        >>> report = {"schema": "visattn.report/1", "kind": "compare", "title": "two plans"}
        >>> write_page(report, "receipt.html")
    """
    write_whole(path, render_page(report).encode())


def check(report: Mapping[str, Any]) -> None:
    """Raise ValueError unless this version can show the report."""
    schema, kind, title = (report.get(key) for key in ("schema", "kind", "title"))
    if schema != SCHEMA:
        raise ValueError(f"the report has schema {schema!r}; this version shows {SCHEMA!r} only")
    if kind not in KINDS:
        known = " or ".join(map(repr, KINDS))
        raise ValueError(f"the report has kind {kind!r}; it must be {known}")
    if not isinstance(title, str) or not title:
        raise ValueError(f"the report has title {title!r}; it must be some text")


class Section(NamedTuple):
    """A part of the page."""

    name: str
    title: str
    lede: str
    content: Markup


def sections(report: Mapping[str, Any]) -> list[Section]:
    """Return the parts of the page for which the report has data."""
    part = {key: value for key, value in report.items() if value}
    parts: list[Section] = []

    def add(name: str, title: str, lede: str, content: Markup) -> None:
        parts.append(Section(name, title, lede, content))

    if "clips" in part:
        add("clips", "Videos", "Side by side, in step.",
            clips_html(part["clips"], part.get("settings", {})))
    if "claims" in part:
        add("claims", "Claims", "What was promised, and what was found.",
            claims_html(part["claims"]))
    if "heads" in part:
        add("heads", "Heads", "What each head runs: layers down, heads across. Select "
            "one to see its pattern and its attention.", heads_html(part["heads"]))
    if "front" in part:
        add("front", "Speed and quality", "Up and to the right is better. Bars are "
            "intervals.", front_html(part["front"]))
    if "table" in part:
        chosen = {row.get("name") for row in part.get("front", ()) if row.get("chosen")}
        add("table", "Plans", "Density is the kept fraction of (query, key) pairs, "
            "executed the share of blocks that run. A difference in bold has an interval "
            "that leaves out 0.", plans_html(part["table"], chosen))
    if "speed" in part:
        add("speed", "Predicted and measured", "Speedup over dense; the dashed line is "
            "1x. The ring is predicted, the dot measured, the bar its interval.",
            speeds_html(part["speed"]))
    if "stability" in part:
        add("stability", "Stability", "How far the search would choose the same again.",
            rows_html(part["stability"], ("name", "value", "note"), "Stability"))
    if "failures" in part:
        add("failures", "Failures", "What did not run, or ended early.",
            rows_html(part["failures"], ("item", "error"), "Failures"))
    if "notes" in part:
        add("notes", "Notes", "", notes_html(part["notes"]))
    if "time" in part:
        add("time", "Time", "What the making of this page took.",
            stages_html(part["time"]))
    groups = [("model", _model(part)), ("settings", part.get("settings", {})),
              ("machine", part.get("machine", {}))]
    if any(facts for _, facts in groups):
        add("setup", "Setup", "", facts_html(groups))
    if "command" in part:
        add("command", "Command", "What made this page.", command_html(part["command"]))
    if "plan" in part:
        add("plan", "Plan", "The chosen plan: JSON, for visattn.apply_plan.",
            plan_html(part["plan"]))
    return parts


def _model(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of the model and of the sequence."""
    model = part.get("model", {})
    facts = {"name": model["name"]} if model.get("name") else {}
    facts.update(model.get("denoisers") or {})
    facts.update({key: part[key] for key in ("layout", "grid") if key in part})
    return facts


def _about(report: Mapping[str, Any]) -> list[str]:
    """Return the model, the layout and the machine, as far as they are known."""
    machine = report.get("machine") or {}
    words = [(report.get("model") or {}).get("name"), report.get("layout"), machine.get("device")]
    return [str(word) for word in words if word]


def _resource(name: str) -> str:
    return files("visattn.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Return the hash of a script as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _embedded(data: Any) -> Markup:
    """Return JSON in which no character can end the script element."""
    text = json.dumps(_rounded(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _rounded(value: Any) -> Any:
    """Round numbers to five significant digits; NaN and infinities become null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
