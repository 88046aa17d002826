"""The methods that docs/methods.md lists: the public names of ``visattn.guidance`` whose docstrings
have a ``Source:`` section."""

from __future__ import annotations

import inspect
import re

import visattn.guidance
from visattn.guidance.edits.block_edits import BlockEdit
from visattn.guidance.edits.edit import Edit

__all__ = ["listed_edits", "listed_methods"]

SOURCE = re.compile(r"^\s*Source:$", re.MULTILINE)


def listed_edits() -> tuple[type | object, ...]:
    """Return the edits, in the order of ``visattn.guidance.__all__``."""
    return tuple(value for value in _with_source() if _is_edit(value))


def listed_methods() -> tuple[type | object, ...]:
    """Return the guidances and other methods, in the order of ``visattn.guidance.__all__``."""
    return tuple(value for value in _with_source() if not _is_edit(value))


def _with_source() -> list[type | object]:
    public = [getattr(visattn.guidance, name) for name in visattn.guidance.__all__]
    described = [value for value in public if inspect.isclass(value) or inspect.isroutine(value)]
    return [value for value in described if SOURCE.search(value.__doc__ or "")]


def _is_edit(value: type | object) -> bool:
    return isinstance(value, type) and issubclass(value, (Edit, BlockEdit))
