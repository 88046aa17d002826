"""The smaller parts of the page: headline figures, claims, facts, texts to copy."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from visattn.plan.hub import PLAN_FILE
from visattn.report.colors import KINDS, kind_class
from visattn.report.templating import render

__all__ = ["claims_html", "command_html", "facts_html", "front_data", "front_html", "headline_html",
           "notes_html", "plan_html", "verdict_html"]

Row = Mapping[str, Any]


class ClaimState(NamedTuple):
    """The result of a claim: its name in the style sheet, a sign, words."""

    style: str
    sign: str
    words: str


CLAIM_STATES = {
    True: ClaimState("yes", "✓", "holds"),
    False: ClaimState("no", "✕", "does not hold"),
    None: ClaimState("open", "–", "not decided"),
}


def headline_html(tiles: Sequence[Row]) -> Markup:
    """Return the figures at the top of the page."""
    return render("headline", tiles=tiles)


def verdict_html(claims: Sequence[Row], failures: Sequence[Row]) -> Markup | None:
    """Return how many claims hold, the claims that do not, and the number of failures."""
    if not claims and not failures:
        return None
    summary = ""
    if claims:
        num_held, num_broken, num_open = (
            sum(claim.get("holds") is state for claim in claims) for state in (True, False, None)
        )
        rest = [f"{num_broken} {'does' if num_broken == 1 else 'do'} not"] if num_broken else []
        rest += [f"{num_open} {'is' if num_open == 1 else 'are'} not decided"] if num_open else []
        summary = ", ".join([f"{num_held} of {len(claims)} claims hold", *rest])
    broken = [claim for claim in claims if claim.get("holds") is False]
    return render("verdict", summary=summary, broken=broken, num_failures=len(failures))


def claims_html(claims: Sequence[Row]) -> Markup:
    """Return each claim with its result and the reason."""
    states = [CLAIM_STATES.get(claim.get("holds"), CLAIM_STATES[None]) for claim in claims]
    return render("claims", claims=list(zip(claims, states, strict=True)))


def front_html(front: Sequence[Row]) -> Markup:
    """Return the switches and the legend of the chart, which a script draws."""
    kinds = [*KINDS, *sorted({str(row.get("kind")) for row in front} - set(KINDS))]
    present = [kind for kind in kinds if any(str(row.get("kind")) == kind for row in front)]
    switches = (
        {
            "title": "Up",
            "name": "up",
            "choices": (("psnr", "PSNR against dense"), ("error", "output error")),
            "shown": any(row.get("psnr") is not None for row in front),
            "default": "error",
        },
        {
            "title": "Across",
            "name": "across",
            "choices": (("speed", "predicted speedup"), ("measured", "measured speedup")),
            "shown": any(row.get("measured") is not None for row in front),
            "default": "speed",
        },
    )
    return render("front", switches=switches, kinds=present)


def front_data(front: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the chart shows of each plan."""
    keys = ("name", "kind", "speed", "measured", "error", "psnr", "psnr_low", "psnr_high",
            "chosen", "pattern")
    return [{**{key: row.get(key) for key in keys}, "mark": kind_class(row.get("kind"))}
            for row in front]


def facts_html(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    """Return names and values, grouped under headings."""
    return render("facts", groups=groups)


def notes_html(notes: Sequence[str]) -> Markup:
    """Return a list of sentences."""
    return render("notes", notes=notes)


def command_html(command: str) -> Markup:
    """Return a line to copy."""
    return render("command", command=command)


def plan_html(plan: Mapping[str, Any]) -> Markup:
    """Return the plan as a file to save; a script shows its text from the link."""
    text = json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    data = text.encode()
    return render("plan", file=PLAN_FILE, data=base64.b64encode(data).decode(),
                  kilobytes=len(data) / 1000)
