"""What a case of scripts/trials.py is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """One small case of a fault that a user could meet.

    Args:
        fault: the fault that the case would show, in a few words.
        run: takes an empty folder to work in and returns, in one short sentence, what was seen.
            It raises an exception, usually by ``assert``, where the fault is there.
    """

    fault: str
    run: Callable[[Path], str]
