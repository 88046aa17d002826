"""Guidances in written form: a name, a colon and parameters, ``softpag:heads=3:2,5,strength=0.5``.

A comma ends a parameter where a name and ``=`` stand behind it, so that values may have commas.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from visattn.guidance.registry import GUIDANCES
from visattn.plan.json_format import brief, shown

__all__ = ["guidance_text", "listed_guidances", "parse_guidance", "parse_guidances"]


def parse_guidance(text: str) -> Any:
    """The guidance that a text says.

    Args:
        text: as ``guidance_text`` writes it; ``heads`` may be the path or hub id of a head set.

    Raises:
        TypeError: it is no text; ValueError: there is no such guidance, or no such parameter, or it
            has another value than it may have.
    """
    if not isinstance(text, str):
        raise TypeError(f"guidance={shown(text)} must be text, as in {_example()}")
    name, colon, rest = text.partition(":")
    own = GUIDANCES.get(name.strip())
    if own is None:
        guess = _guess(name, GUIDANCES)
        raise ValueError(
            f"guidance {shown(text)} has the unknown name {shown(name)}{guess} names are "
            f"{', '.join(GUIDANCES)}, as in {_example()}"
        )
    where = f"guidance {shown(text)}"
    values: dict[str, Any] = {}
    for item in re.split(r",(?=[A-Za-z_]+=)", rest) if colon else ():
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or key not in own.parameters:
            guess = _guess(key, own.parameters)
            raise ValueError(
                f"{where} has the unknown parameter {shown(key)}{guess} those of {name} are "
                f"{', '.join(own.parameters)}, as in {own.example!r}"
            )
        if key in values:
            raise ValueError(f"{where} has the parameter {key} twice")
        kind = own.parameters[key]
        try:
            values[key] = kind.read(value.strip())
        except ValueError as error:
            said = f" ({brief(error)})" if key == "heads" and str(error) else ""
            raise ValueError(
                f"{key}={shown(value)} of {where} must be {kind.allowed}{said}"
            ) from None
    for key in own.needed:
        if key not in values:
            raise ValueError(f"{where} lacks {key}=, as in {own.example!r}")
    try:
        return own.make(**values, **own.fixed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {brief(error)}") from None


def parse_guidances(value: str | Iterable[Any] | None) -> tuple[Any, ...]:
    """One or several guidances, as texts or as what they say; None is none.

    Raises:
        TypeError, ValueError: as ``parse_guidance``, or one cannot be written as a text.
    """
    if value is None:
        return ()
    items = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    found = tuple(parse_guidance(own) if isinstance(own, str) else own for own in items)
    for own in found:
        guidance_text(own)
    return found


def guidance_text(value: Any) -> str:
    """A guidance in written form, with all its parameters; heads are written out, so that no file
    is needed to read it.

    Raises:
        TypeError: it is none of those that have a name.
    """
    for name, own in GUIDANCES.items():
        if own.is_of(value):
            given = {key: getattr(value, key) for key in own.parameters}
            items = [
                f"{key}={own.parameters[key].write(part)}"
                for key, part in given.items()
                if part is not None
            ]
            return f"{name}:{','.join(items)}"
    raise TypeError(
        f"guidance={shown(value)} must be a guidance that has a name: {', '.join(GUIDANCES)}, as "
        f"in {_example()}"
    )


def listed_guidances() -> list[dict[str, Any]]:
    """Names, summaries, examples and parameters of the guidances, as JSON values."""
    return [
        {
            "name": name,
            "summary": own.summary,
            "example": own.example,
            "parameters": {key: kind.allowed for key, kind in own.parameters.items()},
        }
        for name, own in GUIDANCES.items()
    ]


def _example() -> str:
    return repr(GUIDANCES["softpag"].example)


def _guess(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.strip()[:60], list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ";"
