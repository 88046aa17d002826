"""The output of a command: its result, and a line for each failure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Output", "error_line", "plain"]

# Characters that move the cursor of a terminal or change the direction of text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
MOST = 2000  # length limit of a line on stderr


class Output(NamedTuple):
    """The text for stdout, and the failures.

    Attributes:
        text: the text for stdout.
        failures: a line for each part of the work that failed.
        elsewhere: whether a part failed in another process, which prints the line.
    """

    text: str
    failures: Sequence[str] = ()
    elsewhere: bool = False


def plain(text: str) -> str:
    """Return a text for a terminal: control characters except tabs and newlines are escaped."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def error_line(message: str) -> str:
    """Return a message as one line for stderr, of limited length."""
    line = plain(" ".join(message.split()))
    return f"visattn: error: {line if len(line) <= MOST else f'{line[:MOST]}...'}\n"
