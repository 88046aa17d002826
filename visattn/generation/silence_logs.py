"""Other libraries kept quiet, and what they would have said kept."""

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
    """Keeps each line once, in the order in which they came."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.name.split('.')[0]}: {' '.join(record.getMessage().split())}"
        if line not in self.lines:
            self.lines.append(line)


def _prints(handler: logging.Handler) -> bool:
    """Whether it writes to the terminal; a FileHandler is a kind of StreamHandler."""
    return isinstance(handler, logging.StreamHandler) and not isinstance(
        handler, logging.FileHandler
    )


@contextmanager
def quiet() -> Iterator[list[str]]:
    """No progress bars, printed log lines and warnings of diffusers and the libraries below it
    inside a ``with`` block; everything is afterwards as it was.

    Returns:
        The log lines of at least level WARNING, as ``"diffusers: what it says"``, each once. Bars
        of downloads stay where stderr is a terminal.
    """
    of_diffusers: Any = importlib.import_module("diffusers.utils.logging")
    of_hub: Any = importlib.import_module("huggingface_hub.utils")
    of_transformers: Any = importlib.import_module("transformers.utils.logging")
    lines: list[str] = []
    collector = Collector(lines)
    root = logging.getLogger()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    if not root.handlers:  # what comes to it would be printed
        loggers.append(root)
    handlers = [(logger, logger.handlers[:]) for logger in loggers]
    bars = (
        of_diffusers.is_progress_bar_enabled(),
        of_transformers.is_progress_bar_enabled(),
        not of_hub.are_progress_bars_disabled(),
    )
    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()  # switches the hub's off too
    if bars[2] and sys.stderr.isatty():
        of_hub.enable_progress_bars()
    for logger, own in handlers:
        kept = [each for each in own if logger.name == "visattn" or not _prints(each)]
        logger.handlers[:] = [*kept, collector]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(?!visattn)")
            yield lines
    finally:
        for logger, own in handlers:
            logger.handlers[:] = own
        if bars[0]:
            of_diffusers.enable_progress_bar()
        if bars[1]:
            of_transformers.enable_progress_bar()
        if bars[2]:
            of_hub.enable_progress_bars()
        else:
            of_hub.disable_progress_bars()
