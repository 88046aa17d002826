"""Which text tokens are a prompt's own, and which are a phrase of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["phrase_tokens", "real_tokens"]


def real_tokens(
    tokenizer: Any, prompt: str, template: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Numbers of the tokens of a prompt among those a pipeline gives its denoiser, without padding
    and begin or end.

    Args:
        tokenizer: of the pipeline, a fast one of transformers.
        prompt: as the pipeline gets it.
        template: the pipeline's ``prompt_template``, where it has one, as HunyuanVideo does:
            ``template`` with ``{}`` where the prompt is, and ``crop_start``, the number of tokens
            that are taken away in front.
    """
    return tuple(number for number, _, _ in _spans(tokenizer, prompt, template))


def phrase_tokens(
    tokenizer: Any, prompt: str, phrase: str, template: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Numbers of the tokens of a phrase, at its first place in the prompt.

    Args:
        tokenizer, prompt, template: as for ``real_tokens``.
        phrase: a part of the prompt, such as a word.

    Raises:
        ValueError: the prompt has no such phrase, or no token of it.
    """
    first = prompt.find(phrase)
    if first < 0 or not phrase:
        raise ValueError(f"phrase={phrase!r} must be a part of the prompt {prompt!r}")
    end = first + len(phrase)
    spans = _spans(tokenizer, prompt, template)
    found = tuple(number for number, start, stop in spans if start < end and stop > first)
    if not found:
        raise ValueError(f"phrase={phrase!r} has no token of its own in {prompt!r}")
    return found


def _spans(
    tokenizer: Any, prompt: str, template: Mapping[str, Any] | None
) -> list[tuple[int, int, int]]:
    """Number, first character and end of each token of the prompt that is not special."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"tokenizer={type(tokenizer).__name__} does not say where its tokens are in the text; "
            "take the fast one of transformers, or count the tokens yourself"
        )
    form = "{}" if template is None else template["template"]
    crop = 0 if template is None else template.get("crop_start")
    if form.count("{}") != 1 or not isinstance(crop, int):
        raise ValueError(
            f"template={template!r} must have a template with one {{}} and crop_start, a number of "
            "tokens"
        )
    before = form.index("{}")
    found = tokenizer(
        form.replace("{}", prompt), return_offsets_mapping=True, return_special_tokens_mask=True
    )
    rows = zip(found["offset_mapping"], found["special_tokens_mask"], strict=True)
    spans = [(n - crop, a - before, b - before, own) for n, ((a, b), own) in enumerate(rows)]
    return [
        (n, a, b)
        for n, a, b, special in spans
        if not special and n >= 0 and (template is None or (b > 0 and a < len(prompt)))
    ]
