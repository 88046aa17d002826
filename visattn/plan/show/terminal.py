"""Plans and their differences as text for a terminal."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, Skip
from visattn.plan.plan import Plan
from visattn.plan.show.columns import aligned, cell
from visattn.plan.show.difference import HeadChange, PlanDifference
from visattn.plan.show.plan_view import Densities, PlanRow, PlanView
from visattn.plan.show.planned_denoisers import Heads, PlannedDenoiser

__all__ = ["difference_text", "facts_of", "number_words", "plain", "plan_text"]

Names = Mapping[HeadPattern, str]
WIDTH = 100  # of a line
MOST_VALUES = 12  # keys of an object that are shown
MOST_PATTERN, MOST_TEXT = 240, 2000  # characters of a pattern and of a text


def plan_text(view: PlanView) -> str:
    """Return a view as text for a terminal."""
    facts = facts_of(view)
    width = max(map(len, facts)) + 2
    lines = []
    for name, value in facts.items():
        first, *others = value.split("; ")
        lines.append(f"{name.ljust(width)}{first}")
        lines += [" " * width + text for text in others]
    lines += ["", *aligned([("layer", "when", "density", "heads"), *_layer_lines(view)], WIDTH)]
    lines += [*_legend(view.names, view.densities, view.misfits), ""]
    for name in ("evidence", "provenance"):
        values = getattr(view.plan, name)
        lines += [name, *_value_lines(values, "  ")] if values else [f"{name}: none"]
    return "\n".join(lines)


def facts_of(view: PlanView) -> dict[str, str]:
    """Return the model, settings and density of a plan in words, with "; " between items."""
    plan = view.plan
    denoisers = [f"{role}: {plain(str(denoiser))}" for role, denoiser in plan.denoisers.items()]
    facts = {
        "model": plain(plan.model or "any"),
        "denoisers": "; ".join(denoisers) or "any",
        "geometry": "none" if plan.geometry is None else _layout_words(plan.geometry),
        "dense layers": ", ".join(map(str, plan.dense_layers)) or "none",
        "dense steps": _step_words(plan),
    }
    if plan.phases:
        ends = ", ".join(f"{end:.0%}" for end in plan.phases)
        facts["phases"] = f"{len(plan.phases) + 1}, split at {ends} of the steps"
    return facts | {"density": _density_words(view)}


def difference_text(difference: PlanDifference, old: str, new: str) -> str:
    """Return a difference as text for a terminal.

    Args:
        difference: of two plans.
        old: name of the plan before.
        new: name of the plan after.
    """
    if difference.same:
        return "the same"
    lines = [f"old: {plain(old)}", f"new: {plain(new)}"]
    for key, values in difference.settings.items():
        before, after = ("none" if value is None else _value_words(value) for value in values)
        line = f"{plain(key)}: {before} -> {after}"
        if len(line) <= WIDTH:
            lines.append(line)
        else:
            lines += [f"{plain(key)}:", f"    {before}", f"    -> {after}"]
    if difference.note is not None:
        return "\n".join([*lines, plain(difference.note)])
    if not difference.changes:
        return "\n".join([*lines, "all heads run the same"])
    densities = difference.densities
    table = [("layer", "when", "density", "heads", "change")]
    for change in difference.changes:
        names = difference.names[change.old], difference.names[change.new]
        pair = densities[0][change.old], densities[1][change.new]
        table.append(
            (
                change.denoiser.words(change.layers),
                change.when,
                " -> ".join(map(cell, pair)),
                _which_heads(change),
                " -> ".join(names),
            )
        )
    mean = " -> ".join("not known" if x is None else f"{x:.3f}" for x in difference.density)
    return "\n".join(
        [
            *lines,
            f"mean density: {mean}",
            "",
            *aligned([tuple(map(plain, row)) for row in table], WIDTH),
            *_legend(difference.names, {**densities[0], **densities[1]}, {}),
        ]
    )


def plain(text: str) -> str:
    """Return a text of a file without line breaks and control characters."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def number_words(numbers: Iterable[int]) -> str:
    """Return numbers as ranges: ``"0-3, 7"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _layout_words(layout: TokenLayout) -> str:
    return f"{layout}, {layout.length} tokens"


def _step_words(plan: Plan) -> str:
    words = [
        f"the {end} {f'{count:.0%} of the steps' if isinstance(count, float) else count}"
        for end, count in zip(("first", "last"), plan.dense_steps, strict=True)
        if count
    ]
    return " and ".join(words) or "none"


def _density_words(view: PlanView) -> str:
    """Return the mean density in words, or why it is unknown."""
    if view.layout is None:
        return "not known without a layout, which --grid gives"
    if view.density is not None:
        where = "" if view.layout == view.plan.geometry else f" at {view.layout}"
        return f"{view.density:.3f}{where}, mean over layers and heads outside dense steps"
    if view.misfits:
        names = ", ".join(view.names[pattern] for pattern in view.misfits)
        return f"not known: {view.layout} does not fit {names}"
    if any(density is None for density in view.densities.values()):
        return "not known: some heads choose what they see at run time"
    return "not known: the plan does not say how many layers its model has"


def _layer_lines(view: PlanView) -> list[tuple[str, ...]]:
    """Return the table rows of layers; neighbouring equal layers share a row."""
    runs: list[tuple[PlannedDenoiser, list[str], list[PlanRow]]] = []
    for denoiser, layer, rows in view.layers:
        bare = [replace(row, layer="") for row in rows]
        if denoiser.whole and runs and runs[-1][0] is denoiser and runs[-1][2] == bare:
            runs[-1][1].append(layer)
        else:
            runs.append((denoiser, [layer], bare))
    return [
        (
            plain(denoiser.words(layers)) if number == 0 else "",
            row.when,
            cell(row.density),
            _heads_words(row.patterns, view.names),
        )
        for denoiser, layers, rows in runs
        for number, row in enumerate(rows)
    ]


def _heads_words(heads: Heads, names: Names) -> str:
    """Return the heads of each pattern: ``"all p1"``, or ``"p1: 0-3, 7; p2: 4-6"``."""
    distinct = list(dict.fromkeys(heads))
    if len(distinct) == 1:
        return f"all {names[distinct[0]]}"
    return "; ".join(
        f"{names[pattern]}: {number_words(n for n, head in enumerate(heads) if head == pattern)}"
        for pattern in distinct
    )


def _which_heads(change: HeadChange) -> str:
    """Return the heads of a change: ``"0-3, 7 of 12"``."""
    if change.heads is None:
        return "all"
    if len(change.heads) == change.count:
        return f"all {change.count}"
    return f"{number_words(change.heads)} of {change.count}"


def _legend(names: Names, densities: Densities, misfits: Names) -> list[str]:
    """Return a line for each pattern: its name, written form, and density or why it has none."""
    lines = []
    for pattern, name in names.items():
        if pattern in (Dense(), Skip()):  # their names say it
            continue
        text = repr(pattern)
        if len(text) > MOST_PATTERN:
            text = f"{text[:MOST_PATTERN]}... ({len(text)} characters)"
        density = densities.get(pattern)
        note = "" if density is None else f", density {density:.3f}"
        if pattern in misfits:
            note = f", does not fit: {plain(misfits[pattern])}"
        lines.append(f"{name} = {text}{note}")
    return ["", *lines] if lines else []


def _value_words(value: object) -> str:
    """Return a JSON value on one line, cut to a readable length."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) <= WIDTH:
        return plain(text)
    many = f" ({len(value)} values)" if isinstance(value, (list, dict)) else ""
    return f"{plain(text[:WIDTH])}...{many}"


def _value_lines(values: Mapping[str, Any], indent: str) -> list[str]:
    """Return JSON values as lines: one key on a line, long values cut."""
    lines = []
    for name, value in sorted(values.items())[:MOST_VALUES]:
        head = f"{indent}{plain(name)}"
        if isinstance(value, Mapping) and value:
            lines += [head, *_value_lines(value, indent + "  ")]
            continue
        text = plain(value[:MOST_TEXT]) if isinstance(value, str) else _value_words(value)
        lines += textwrap.wrap(
            f"{head}: {text}", WIDTH, subsequent_indent=indent + "    ", break_on_hyphens=False
        )
    if len(values) > MOST_VALUES:
        lines.append(f"{indent}and {len(values) - MOST_VALUES} more; --json has them")
    return lines
