"""Find the text tokens of a prompt, and those of a phrase in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["phrase_tokens", "real_tokens"]


def real_tokens(
    tokenizer: Any, prompt: str, template: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the indices of the tokens of a prompt among the text tokens that a pipeline gives its
    denoiser, without padding and special tokens.

    Args:
        tokenizer: tokenizer of the pipeline, a fast one of transformers.
        prompt: the prompt, as the pipeline gets it.
        template: ``prompt_template`` of the pipeline, if it has one, as HunyuanVideo does: a
            mapping with ``template``, which has ``{}`` at the place of the prompt, and
            ``crop_start``, the number of tokens that the pipeline cuts off at the start.

    Returns:
        The indices, ascending.

    Raises:
        TypeError: the tokenizer is no fast one.
        ValueError: ``template`` has the wrong form.

    Example:
        >>> from visattn.guidance import real_tokens
        >>> real_tokens(pipe.tokenizer, "a red square")
        (0, 1, 2)
    """
    return tuple(number for number, _, _ in _spans(tokenizer, prompt, template))


def phrase_tokens(
    tokenizer: Any, prompt: str, phrase: str, template: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the indices of the tokens of a phrase, at its first occurrence in the prompt.

    Args:
        tokenizer: tokenizer of the pipeline, a fast one of transformers.
        prompt: the prompt, as the pipeline gets it.
        phrase: a part of the prompt, such as a word.
        template: ``prompt_template`` of the pipeline, as in ``real_tokens``.

    Returns:
        The indices, ascending.

    Raises:
        TypeError: the tokenizer is no fast one.
        ValueError: the phrase is not in the prompt, no token belongs to it, or ``template`` has the
            wrong form.

    Example:
        >>> from visattn.guidance import phrase_tokens
        >>> phrase_tokens(pipe.tokenizer, "a red square moves right", "red square")
        (1, 2)
    """
    first = prompt.find(phrase)
    if first < 0 or not phrase:
        raise ValueError(f"phrase={phrase!r} must be a part of the prompt {prompt!r}")
    end = first + len(phrase)
    spans = _spans(tokenizer, prompt, template)
    tokens = tuple(number for number, start, stop in spans if start < end and stop > first)
    if not tokens:
        raise ValueError(f"phrase={phrase!r} has no token in {prompt!r}")
    return tokens


def _spans(
    tokenizer: Any, prompt: str, template: Mapping[str, Any] | None
) -> list[tuple[int, int, int]]:
    """Return the index, first character and end of each token of the prompt, without special
    tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer={type(tokenizer).__name__} does not give the places of its tokens in the "
            "text; use a fast tokenizer of transformers, or count the tokens yourself"
        )
    form = "{}" if template is None else template["template"]
    crop = 0 if template is None else template.get("crop_start")
    if form.count("{}") != 1 or not isinstance(crop, int):
        raise ValueError(
            f"template={template!r} must have the keys template, a text with one {{}}, and "
            "crop_start, a number of tokens"
        )
    before = form.index("{}")
    encoding = tokenizer(
        form.replace("{}", prompt), return_offsets_mapping=True, return_special_tokens_mask=True
    )
    rows = zip(encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True)
    spans = [
        (n - crop, a - before, b - before, special) for n, ((a, b), special) in enumerate(rows)
    ]
    return [
        (n, a, b)
        for n, a, b, special in spans
        if not special and n >= 0 and (template is None or (b > 0 and a < len(prompt)))
    ]
