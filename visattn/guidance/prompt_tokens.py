"""Which text tokens are a prompt's own, and which are a phrase of it."""

from __future__ import annotations

from typing import Any

__all__ = ["phrase_tokens", "real_tokens"]


def real_tokens(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Numbers of the tokens of a prompt among those a pipeline gives its denoiser, without padding
    and begin or end.

    Args:
        tokenizer: of the pipeline, a fast one of transformers.
        prompt: as the pipeline gets it.
    """
    return tuple(number for number, _, _ in _spans(tokenizer, prompt))


def phrase_tokens(tokenizer: Any, prompt: str, phrase: str) -> tuple[int, ...]:
    """Numbers of the tokens of a phrase, at its first place in the prompt.

    Args:
        tokenizer, prompt: as for ``real_tokens``.
        phrase: a part of the prompt, such as a word.

    Raises:
        ValueError: the prompt has no such phrase, or no token of it.
    """
    first = prompt.find(phrase)
    if first < 0 or not phrase:
        raise ValueError(f"phrase={phrase!r} must be a part of the prompt {prompt!r}")
    end = first + len(phrase)
    found = tuple(
        number for number, start, stop in _spans(tokenizer, prompt) if start < end and stop > first
    )
    if not found:
        raise ValueError(f"phrase={phrase!r} has no token of its own in {prompt!r}")
    return found


def _spans(tokenizer: Any, prompt: str) -> list[tuple[int, int, int]]:
    """Number, first character and end of each token that is not special."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer={type(tokenizer).__name__} does not say where its tokens are in the text; "
            "take the fast one of transformers, or count the tokens yourself"
        )
    found = tokenizer(prompt, return_offsets_mapping=True, return_special_tokens_mask=True)
    rows = zip(found["offset_mapping"], found["special_tokens_mask"], strict=True)
    return [(n, start, stop) for n, ((start, stop), special) in enumerate(rows) if not special]
