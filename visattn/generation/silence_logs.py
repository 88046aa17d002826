"""Silence other libraries and collect their log lines."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet"]

LIBRARIES = ("visattn", "diffusers", "transformers", "huggingface_hub", "accelerate", "peft")


class Collector(logging.Handler):
    """Collects each line once, in order of arrival."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.name.split('.')[0]}: {' '.join(record.getMessage().split())}"
        if line not in self.lines:
            self.lines.append(line)


def _prints(handler: logging.Handler) -> bool:
    """Return whether a handler writes to the terminal; FileHandler is a subclass of
    StreamHandler."""
    return isinstance(handler, logging.StreamHandler) and not isinstance(
        handler, logging.FileHandler
    )


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Switch off progress bars, printed log lines and warnings of diffusers and its libraries in a
    ``with`` block. Progress bars of downloads remain if stderr is a terminal.

    Yields:
        A list that collects the log lines of level WARNING and above, such as
        ``"diffusers: the message"``, each once.
    """
    of_diffusers: Any = importlib.import_module("diffusers.utils.logging")
    of_hub: Any = importlib.import_module("huggingface_hub.utils")
    of_transformers: Any = importlib.import_module("transformers.utils.logging")
    lines: list[str] = []
    collector = Collector(lines)
    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    if not root.handlers:  # its messages would be printed
        loggers.append(root)
    handlers = [(logger, logger.handlers[:]) for logger in loggers]
    bars = (
        of_diffusers.is_progress_bar_enabled(),
        of_transformers.is_progress_bar_enabled(),
        not of_hub.are_progress_bars_disabled(),
    )
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()  # switches the bars of huggingface_hub off too
    if bars[2] and sys.stderr.isatty():
        of_hub.enable_progress_bars()
    for logger, previous in handlers:
        kept = [each for each in previous if logger.name == "visattn" or not _prints(each)]
        logger.handlers[:] = [*kept, collector]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(?!visattn)")
            yield lines
    finally:
        for logger, previous in handlers:
            logger.handlers[:] = previous
        if bars[0]:
            of_diffusers.enable_progress_bar()
        if bars[1]:
            of_transformers.enable_progress_bar()
        if bars[2]:
            of_hub.enable_progress_bars()
        else:
            of_hub.disable_progress_bars()
