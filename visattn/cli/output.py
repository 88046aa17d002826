"""What a command prints: its result, and a line for each part that failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Output", "error_line"]


class Output(NamedTuple):
    """The text for stdout, and a sentence for each part of the work that failed."""

    text: str
    failures: Sequence[str] = ()


def error_line(message: str) -> str:
    """One line for stderr, whatever the message holds."""
    return f"visattn: error: {' '.join(message.split())}\n"
