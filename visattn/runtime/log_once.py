"""Warnings that are logged once in a process."""

from __future__ import annotations

import functools
import logging

__all__ = ["warn_once"]


@functools.cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning; the same message to the same logger is logged once."""
    logger.warning(message)
