"""Prompts that the tokenizers of a pipeline truncate; some pipelines do not report this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from visattn.plan.json_format import shown

__all__ = ["cut_texts"]


@contextmanager
def cut_texts(pipe: Any) -> Iterator[list[str]]:
    """Collect a line for each text that a tokenizer of the pipeline truncates in a ``with`` block,
    with the number of tokens over the limit and the words that are cut off."""
    from transformers import PreTrainedTokenizerBase

    lines: list[str] = []
    kinds: list[tuple[Any, type]] = []
    for name, part in pipe.components.items():
        kind = type(part)
        if isinstance(part, PreTrainedTokenizerBase) and not hasattr(kind, "_visattn_lines"):
            kinds.append((part, kind))
            part.__class__ = _watched(kind, name, lines)
    try:
        yield lines
    finally:
        for part, kind in kinds:
            part.__class__ = kind


def _watched(kind: Any, name: str, lines: list[str]) -> Any:
    """Return a subclass of a tokenizer class whose call checks for truncated texts."""

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        out = kind.__call__(self, text, *args, **options)
        limit = options.get("max_length") or self.model_max_length
        texts = [text] if isinstance(text, str) else text if isinstance(text, (list, tuple)) else ()
        for each in texts if options.get("truncation") else ():
            line = _cut(kind, self, each, limit) if isinstance(each, str) else None
            if line is not None and f"{name} {line}" not in lines:
                lines.append(f"{name} {line}")
        return out

    body = {"__call__": call, "__module__": kind.__module__, "_visattn_lines": lines}
    return type(kind.__name__, (kind,), body)


def _cut(kind: Any, tokenizer: Any, text: str, limit: int) -> str | None:
    """Return a line about what a limit in tokens cuts off a text, or None if it fits."""

    def ids(special: bool) -> list[int]:
        encoding = kind.__call__(tokenizer, text, add_special_tokens=special, verbose=False)
        return list(encoding["input_ids"])

    cut = len(ids(True)) - limit
    if cut <= 0:
        return None
    words_ids = ids(False)
    lost = words_ids[:cut] if tokenizer.truncation_side == "left" else words_ids[-cut:]
    words = shown(tokenizer.decode(lost, skip_special_tokens=True))
    return f"takes {limit} tokens; {cut} more of a text are cut off: {words}"
