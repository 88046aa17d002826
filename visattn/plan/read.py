"""A plan from what a user writes: a file, a hub id, a pattern, ``auto`` or ``none``."""

from __future__ import annotations

import os
from pathlib import Path

from visattn.patterns import HeadPattern, parse_pattern
from visattn.patterns.grammar.parse import is_pattern_name
from visattn.plan.hub import PLAN_FILE
from visattn.plan.plan import Plan, Rule

__all__ = ["as_plan", "is_pattern", "read_plan"]

# of a checkout; an installed package has none
PLANS = Path(__file__).resolve().parents[2] / "assets" / "plans"
PRESETS = PLANS / "presets"


def as_plan(value: object, model_path: str | None = None) -> Plan:
    """The plan that ``apply_plan`` is given: a Plan, a pattern for all heads, or what ``read_plan``
    reads.

    Raises:
        TypeError, ValueError, OSError: it is none of these.
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
        "or 'auto'; remove_plan(pipe) takes a plan away"
    )


def read_plan(
    text: str | os.PathLike[str],
    *,
    model_path: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Plan | None:
    """The plan that ``text`` names.

    Args:
        text: ``"none"`` (no plan), ``"auto"`` (the plan that lies beside the model's weights, or in
            a checkout the one of its name in ``assets/plans``), a pattern for all heads in written
            form, the path of a plan or of its folder, or a hub id.
        model_path: folder or hub id of the model, for ``"auto"``.
        revision, token: of the hub.

    Raises:
        TypeError, ValueError: it is no plan, or ``"auto"`` finds none.
        OSError: it cannot be read.
    """
    if isinstance(text, str):
        if text.lower() == "none":
            return None
        if text.lower() == "auto":
            return _beside(model_path, revision, token)
        if is_pattern(text):
            return Plan((Rule(parse_pattern(text)),))
    return Plan.from_pretrained(text, revision=revision, token=token)


def is_pattern(text: str) -> bool:
    """Whether a text is meant as the written form of a pattern: it is no file, and is a pattern's
    name or has brackets."""
    return not os.path.exists(text) and ("(" in text or is_pattern_name(text.strip()))


def _beside(model_path: str | None, revision: str | None, token: str | None) -> Plan:
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
        known = f" (unsearched presets for it lie in {PRESETS}: {presets})" if presets else ""
        raise ValueError(
            f"plan='auto' found no {PLAN_FILE} with the model {model_path!r}; give the path or hub "
            f"id of a plan{known}, or a pattern such as 'radial()'"
        ) from None


def _presets_for(model: str) -> list[str]:
    """Names of the presets for a model: a hub id, or a folder of the same name."""
    return [
        path.parent.name
        for path in sorted(PRESETS.glob(f"*/{PLAN_FILE}"))
        if Path(Plan.from_pretrained(path).model or "").name == Path(model).name
    ]
