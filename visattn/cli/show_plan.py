"""The part of ``visattn show`` that looks at plans."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence

from visattn.layout import TokenLayout
from visattn.patterns.parse import known_kinds
from visattn.pipelines.families import FAMILIES
from visattn.plan import Plan
from visattn.plan.difference import difference
from visattn.plan.source import as_plan, is_pattern
from visattn.plan.text import difference_text, plan_text
from visattn.plan.view import view_plan

__all__ = ["layer_paths", "read_shown", "show_difference", "show_plan"]


def read_shown(text: str) -> Plan:
    """The plan of a file, a folder or a hub id, or of a pattern for all heads.

    Raises:
        TypeError, ValueError, OSError: there is none.
    """
    if not (is_pattern(text) or os.path.exists(text) or "/" in text or text.endswith(".json")):
        close = difflib.get_close_matches(text.lower()[:100], known_kinds(), n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"{text!r} is no pattern, and no file, folder or hub id of a plan; {guess}"
            "visattn show --list names the patterns"
        )
    return as_plan(text)


def show_plan(
    plan: Plan, layout: TokenLayout | None, *, name: str, output: str | None, as_json: bool
) -> str:
    """A plan as text or JSON, and drawn into a file.

    Args:
        layout: that densities are of; name: what the plan is called.
    """
    view = view_plan(plan, layout, layer_paths([plan]))
    if output is not None:
        from visattn.picture import save_png  # Pillow is loaded for pictures only
        from visattn.plan.head_map import draw_plan

        save_png(draw_plan(view, title=name), output)
    if as_json:
        return json.dumps(view.numbers(), indent=2, sort_keys=True)
    return plan_text(view) if output is None else f"wrote {output}"


def show_difference(
    old: Plan, new: Plan, layout: TokenLayout | None, *, names: Sequence[str], as_json: bool
) -> str:
    """What is different between two plans, as text or JSON."""
    own = difference(old, new, layout, layer_paths([old, new]))
    if as_json:
        return json.dumps(own.numbers(), indent=2, sort_keys=True)
    return difference_text(own, *names)


def layer_paths(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """The paths of the attention layers of the denoisers that plans name, where their family is
    known and numbers them."""
    paths: dict[str, list[str]] = {}
    for plan in plans:
        for role, denoiser in plan.denoisers.items():
            family = FAMILIES.get(denoiser.kind)
            parts = [] if family is None else family.layers.replace("\\.", ".").split("\\d+")
            if family is None or len(parts) != 2:
                continue
            own = [f"{parts[0]}{number}{parts[1]}" for number in range(denoiser.layers)]
            if all(re.fullmatch(family.layers, path) for path in own):
                paths[role] = own
    return paths
