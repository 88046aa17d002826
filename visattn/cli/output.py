"""What a command prints: its result, and a line for each part that failed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Output", "error_line", "plain"]

# What moves the cursor of a terminal, or turns the order of its letters.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST = 2000  # characters of a line of stderr


class Output(NamedTuple):
    """The text for stdout, and a sentence for each part of the work that failed.

    Attributes:
        elsewhere: whether a part failed in another process, which has the sentence.
    """

    text: str
    failures: Sequence[str] = ()
    elsewhere: bool = False


def plain(text: str) -> str:
    """A text for a terminal: control characters but tabs and ends of lines as their escapes."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def error_line(message: str) -> str:
    """One line for stderr, of a readable length, whatever the message holds."""
    line = plain(" ".join(message.split()))
    return f"visattn: error: {line if len(line) <= MOST else f'{line[:MOST]}...'}\n"
