"""``visattn show`` for plans."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from collections.abc import Sequence

from visattn.geometry.layout import TokenLayout
from visattn.patterns.base.head_pattern import KINDS
from visattn.pipelines.families import FAMILIES
from visattn.pipelines.family import Family
from visattn.plan import ANY, Plan
from visattn.plan.read import as_plan, is_pattern
from visattn.plan.show.difference import difference
from visattn.plan.show.plan_view import view_plan
from visattn.plan.show.planned_denoisers import by_number
from visattn.plan.show.terminal import difference_text, plan_text

__all__ = ["layer_paths", "read_shown", "show_difference", "show_plan"]


def read_shown(text: str) -> Plan:
    """Read the plan of a file, a folder or a hub id, or make one of a pattern for all heads.

    Raises:
        TypeError: the plan is invalid.
        ValueError: there is no such plan.
        OSError: a file cannot be read.
    """
    if not (is_pattern(text) or os.path.exists(text) or "/" in text or text.endswith(".json")):
        close = difflib.get_close_matches(text.lower()[:100], KINDS, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"{text!r} is no pattern, and no file, folder or hub id of a plan; {guess}"
            "visattn show --list names the patterns"
        )
    return as_plan(text)


def show_plan(
    plan: Plan, layout: TokenLayout | None, *, name: str, output: str | None, as_json: bool
) -> str:
    """Return a plan as text or JSON, and draw it into a file.

    Args:
        plan: the plan.
        layout: the token layout of the densities.
        name: the title of the picture.
        output: the PNG file, or None for no picture.
        as_json: whether to return JSON.
    """
    view = view_plan(plan, layout, layer_paths([plan]))
    if output is not None:
        from visattn.draw.canvas import save_png  # Pillow is loaded for pictures only
        from visattn.draw.plan_picture import draw_plan

        save_png(draw_plan(view, title=name), output)
    if as_json:
        return json.dumps(view.numbers(), indent=2, sort_keys=True)
    return plan_text(view) if output is None else f"wrote {output}"


def show_difference(
    old: Plan, new: Plan, layout: TokenLayout | None, *, names: Sequence[str], as_json: bool
) -> str:
    """Return the difference of two plans as text or JSON."""
    changes = difference(old, new, layout, layer_paths([old, new]))
    if as_json:
        return json.dumps(changes.numbers(), indent=2, sort_keys=True)
    return difference_text(changes, *names)


def layer_paths(plans: Sequence[Plan]) -> dict[str, list[str]]:
    """Return the paths of the attention layers of the denoisers of plans, by role. A denoiser is
    left out if its family is unknown, or neither the family nor a plan gives the paths of all
    layers."""
    paths: dict[str, list[str]] = {}
    for plan in plans:
        for role, denoiser in plan.denoisers.items():
            family = FAMILIES.get(denoiser.kind)
            if family is None:
                continue
            form = family.layers.replace("\\.", ".")
            layers = [form.replace("\\d+", str(number)) for number in range(denoiser.layers)]
            if not all(re.fullmatch(family.layers, path) for path in layers):
                named = {rule.layer for rule in plan.rules if rule.role in (role, ANY)} - {ANY}
                layers = sorted(named, key=functools.partial(_in_order, family))
            if len(layers) == denoiser.layers:
                paths[role] = layers
    return paths


def _in_order(family: Family, path: str) -> tuple[int, list[tuple[int, str]]]:
    """Return the sort key of a layer: the stack of its block, then its numbers."""
    block = path.rpartition(".")[0]
    stacks = [number for number, stack in enumerate(family.blocks) if re.fullmatch(stack, block)]
    return (*stacks, len(family.blocks))[0], by_number(path)
