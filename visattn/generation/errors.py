"""Errors as they are told: one line, whatever library raised them."""

from __future__ import annotations

from visattn.attention.choice import BackendUnavailable

__all__ = ["REFUSALS", "GenerationError", "reason", "sentence"]


class GenerationError(RuntimeError):
    """A pipeline could not make its frames; the message says why in a line."""


# Errors whose message is a sentence for the user. An error of any other type is named by its type.
REFUSALS = (ValueError, TypeError, OSError, BackendUnavailable, GenerationError)


def reason(error: BaseException) -> str:
    """What an error of another library says, in one line of readable length."""
    text = " ".join(str(error).split())
    if isinstance(error, (LookupError, AttributeError)) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:297]}..."


def sentence(error: BaseException) -> str:
    """What is told of an error: its message, behind its type where it is no refusal."""
    text = " ".join(str(error).split())
    if isinstance(error, REFUSALS) and text:
        return text
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
