"""Patterns of plans of schema 1, which lack the options that were added later."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from visattn.patterns import HeadPattern

__all__ = ["upgraded"]


def upgraded(pattern: HeadPattern) -> HeadPattern:
    """Return the pattern that a plan of schema 1 meant.

    Options that were added after schema 1 get the values that they replaced, also in patterns
    inside the pattern. Plans were written with all options of their time; an option that somebody
    removed by hand gets its present default.

    Args:
        pattern: as the parser reads it, with present defaults.
    """
    changes: dict[str, Any] = dict(pattern.before)
    for field in fields(pattern):  # type: ignore[arg-type]
        value = getattr(pattern, field.name)
        if isinstance(value, HeadPattern) and (inner := upgraded(value)) is not value:
            changes[field.name] = inner
    return replace(pattern, **changes) if changes else pattern  # type: ignore[type-var]
