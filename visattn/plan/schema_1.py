"""What a pattern meant in a plan of schema 1, which lacks the options that came later."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from visattn.patterns import HeadPattern

__all__ = ["former"]


def former(pattern: HeadPattern) -> HeadPattern:
    """The pattern with the options that schema 1 lacks as they were then, in patterns inside of it
    too. Plans were written with all options that there were; an option that somebody left out by
    hand has its present default."""
    changes: dict[str, Any] = dict(pattern.before)
    for own in fields(pattern):  # type: ignore[arg-type]
        value = getattr(pattern, own.name)
        if isinstance(value, HeadPattern) and (inner := former(value)) is not value:
            changes[own.name] = inner
    return replace(pattern, **changes) if changes else pattern  # type: ignore[type-var]
