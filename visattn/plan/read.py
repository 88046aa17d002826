"""Plans from what users pass: a file, a hub id, a pattern, ``auto`` or ``none``."""

from __future__ import annotations

import os
from pathlib import Path

from visattn.patterns import HeadPattern, parse_pattern
from visattn.patterns.grammar.parse import is_pattern_name
from visattn.plan.hub import PLAN_FILE
from visattn.plan.plan import Plan
from visattn.plan.rule import Rule

__all__ = ["as_plan", "is_pattern", "read_plan"]

# Only a checkout has this folder; an installed package does not.
PLANS = Path(__file__).resolve().parents[2] / "assets" / "plans"
PRESETS = PLANS / "presets"


def as_plan(value: object, model_path: str | None = None) -> Plan:
    """Return the plan that ``value`` describes.

    Args:
        value: a Plan, a pattern for all heads, or text that ``read_plan`` reads.
        model_path: folder or hub id of the model, for ``"auto"``.

    Raises:
        TypeError: ``value`` is none of these.
        ValueError: the text is no plan, or ``"auto"`` finds none.
        OSError: the plan cannot be read.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, HeadPattern):
        return Plan((Rule(value),))
    if isinstance(value, (str, os.PathLike)):
        plan = read_plan(value, model_path=model_path)
        if plan is not None:
            return plan
    raise TypeError(
        f"plan={value!r} must be a Plan, a pattern such as Radial(), the path or hub id of a plan, "
        "or 'auto'; remove_plan(pipe) removes a plan"
    )


def read_plan(
    text: str | os.PathLike[str],
    *,
    model_path: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Plan | None:
    """Return the plan that ``text`` names, or None for ``"none"``.

    Args:
        text: ``"none"``; ``"auto"``, the plan in the folder of the model's weights, or in a
            checkout the plan with the model's name in ``assets/plans``; the written form of a
            pattern for all heads; the path of a plan or of its folder; or a hub id.
        model_path: folder or hub id of the model, for ``"auto"``.
        revision: branch, tag or commit of a hub repository.
        token: access token for the hub.

    Raises:
        TypeError: a pattern has an unknown or missing parameter.
        ValueError: the text is no plan, or ``"auto"`` finds none.
        OSError: the plan cannot be read.

    Example:
        >>> from visattn.plan import read_plan
        >>> read_plan("radial(decay=0.5)").rules[0].patterns
        Radial(decay=0.5, sink=False, rule='block', block=128)
    """
    if isinstance(text, str):
        if text.lower() == "none":
            return None
        if text.lower() == "auto":
            return _plan_of_model(model_path, revision, token)
        if is_pattern(text):
            return Plan((Rule(parse_pattern(text)),))
    return Plan.from_pretrained(text, revision=revision, token=token)


def is_pattern(text: str) -> bool:
    """Return whether ``text`` is the written form of a pattern: it has brackets or is the name of a
    pattern, and no file has this name."""
    return not os.path.exists(text) and ("(" in text or is_pattern_name(text.strip()))


def _plan_of_model(model_path: str | None, revision: str | None, token: str | None) -> Plan:
    if not model_path:
        raise ValueError(
            "plan='auto' needs a model that was loaded from a folder or the hub; give the plan's "
            "path or a pattern"
        )
    try:
        return Plan.from_pretrained(model_path, revision=revision, token=token)
    except OSError:
        if (PLANS / Path(model_path).name / PLAN_FILE).is_file():
            return Plan.from_pretrained(PLANS / Path(model_path).name)
        presets = ", ".join(_presets_for(model_path))
        known = f" (unsearched presets for it are in {PRESETS}: {presets})" if presets else ""
        raise ValueError(
            f"plan='auto' found no {PLAN_FILE} with the model {model_path!r}; give the path or hub "
            f"id of a plan{known}, or a pattern such as 'radial()'"
        ) from None


def _presets_for(model: str) -> list[str]:
    """Return the names of the presets for a model, which is a hub id or a folder."""
    return [
        path.parent.name
        for path in sorted(PRESETS.glob(f"*/{PLAN_FILE}"))
        if Path(Plan.from_pretrained(path).model or "").name == Path(model).name
    ]
