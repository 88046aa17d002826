"""The text form of guidances and edits: a call with their parameters, as in
``SoftPAG(heads={3: [0]}, strength=0.5)``."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from visattn._arguments import is_integer
from visattn.guidance.head_set import HeadSet

__all__ = ["Writable", "guidance_text"]


class Writable:
    """Base class of guidances and edits. A subclass is a dataclass; its fields are the parameters
    of its text form.

    Attributes:
        example: its text form with typical values. A class that sets it can be written as a text.
            ``parse_guidance`` reads the text, and ``visattn generate --list-guidance`` lists it.
    """

    example: ClassVar[str] = ""

    @classmethod
    def summary(cls) -> str:
        """Return the first sentence of the docstring, without references."""
        first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        first = re.sub(r" \([^()]*arXiv[^()]*\)", "", first)
        return re.split(r"(?<=\w)\.(?:\s|$)", first)[0].rstrip(".:")

    @classmethod
    def parameters(cls) -> dict[str, str]:
        """Return the descriptions in the docstrings of the parameters that can be written, by
        name."""
        described: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            described |= _described(inspect.cleandoc(base.__doc__ or ""))
        signature = inspect.signature(cls).parameters
        written = {n for n, p in signature.items() if "Tensor" not in str(p.annotation)}
        return {name: described.get(name, "") for name in signature if name in written}

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that make an equal object. Those that are None by default and None
        here are omitted."""
        arguments = {}
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if value is not None or parameter.default is not None:
                as_float = str(parameter.annotation).startswith("float") and is_integer(value)
                arguments[name] = float(value) if as_float else value
        return arguments


def guidance_text(value: Writable) -> str:
    """Return the text form of a guidance or edit, with all its parameters. The heads of a head set
    are listed in the text, so reading the text needs no file.

    Args:
        value: a guidance or edit.

    Returns:
        A text that ``parse_guidance`` reads.

    Raises:
        TypeError: ``value`` has no text form, or a parameter that cannot be written.

    Example:
        >>> from visattn.guidance import SEG, guidance_text
        >>> guidance_text(SEG(layers=[3], sigma=2, scale=3))
        'SEG(start=0, stop=1.0, scale=3.0, layers=[3], sigma=2.0, whole_kernel=False)'
    """
    kind = type(value)
    if not isinstance(value, Writable) or not vars(kind).get("example"):
        raise TypeError(
            f"guidance={value!r} has no text form; visattn generate --list-guidance lists the "
            "guidances that have one"
        )
    arguments = value.arguments().items()
    return f"{kind.__name__}({', '.join(f'{n}={_literal(kind, n, v)}' for n, v in arguments)})"


def _literal(kind: type, name: str, value: object) -> str:
    """Return the literal of the value of a parameter."""
    if isinstance(value, (str, int, type(None))):
        return repr(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        pairs = (f"{_literal(kind, name, k)}: {_literal(kind, name, v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        items = [_literal(kind, name, item) for item in value]
        if isinstance(value, tuple):
            return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        return f"[{', '.join(items)}]"
    hint = "; give the heads to SoftPAG" if isinstance(value, HeadSet) else ""
    raise TypeError(f"{kind.__name__}({name}={value!r}) cannot be written as a text{hint}")


def _described(doc: str) -> dict[str, str]:
    """Return the descriptions of the Args section of a docstring by name."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    items = re.findall(
        r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE
    )
    return {name: " ".join(text.split()).rstrip(".") for name, text in items}
