"""Errors of this package and of other libraries as one line of text."""

from __future__ import annotations

from visattn.attention.choice import BackendUnavailable

__all__ = ["REFUSALS", "GenerationError", "reason", "sentence"]


class GenerationError(RuntimeError):
    """A pipeline could not make its frames; the message is one line with the reason.

    Example:
        >>> from visattn.generation import GenerationError
        >>> str(GenerationError("WanPipeline made frames that are not finite"))
        'WanPipeline made frames that are not finite'
    """


# Errors whose message is written for the user. For other errors the name of the type is shown too.
REFUSALS = (ValueError, TypeError, OSError, BackendUnavailable, GenerationError)


def reason(error: BaseException) -> str:
    """Return the message of an error of another library as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    if isinstance(error, (LookupError, AttributeError)) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= 300 else f"{text[:297]}..."


def sentence(error: BaseException) -> str:
    """Return the message of an error, with the name of its type if it is not one of REFUSALS."""
    text = " ".join(str(error).split())
    if isinstance(error, REFUSALS) and text:
        return text
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
