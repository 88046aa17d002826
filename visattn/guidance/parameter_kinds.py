"""The parameters of guidances in written form: each kind is read from a text, and written as a
text."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visattn.guidance.head_set import HeadSet

__all__ = ["BLOCKS", "BOUND", "COUNT", "HEADS", "LAYERS", "NUMBER", "TEXT", "Kind", "word"]

LAYER = r"(?:-?\d+|[A-Za-z_][\w.]*)"
HEAD = r"\d+(?:@[\d.eE+-]+)?"
PART = rf"{LAYER}:(?:\*|{HEAD}(?:,{HEAD})*)"
WRITTEN_HEADS = re.compile(rf"{PART}(?:;{PART})*")
MAX_DIGITS = 18


@dataclass(frozen=True)
class Kind:
    """A kind of parameter.

    Args:
        allowed: what a value is, as it stands in a sentence.
        read: the value of a text; raises ValueError where it is none.
        write: the text of a value.
    """

    allowed: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]


def word(*choices: str) -> Kind:
    """One of some words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Kind(f"one of {', '.join(choices)}", read, str)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _count(text: str) -> int:
    if not re.fullmatch(r"-?\d+", text) or len(text) > MAX_DIGITS:
        raise ValueError
    return int(text)


def _bound(text: str) -> int | float:
    value = _count(text) if re.fullmatch(r"\d+", text) else _number(text)
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(own) for own in text.split(","))


def _layers(text: str) -> list[int | str]:
    if not re.fullmatch(rf"{LAYER}(,{LAYER})*", text):
        raise ValueError
    return [_layer(own) for own in text.split(",")]


def _layer(text: str) -> int | str:
    return _count(text) if re.fullmatch(r"-?\d+", text) else text


def _list(value: Any) -> str:
    items = [value] if isinstance(value, (int, str)) else value
    if not isinstance(items, Sequence) or not all(isinstance(own, (int, str)) for own in items):
        raise TypeError(f"{value!r} cannot be written as a list of numbers or paths")
    return ",".join(map(str, items))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} cannot be written as one text")
    return value


def _heads(text: str) -> HeadSet | dict[int | str, Any]:
    if not WRITTEN_HEADS.fullmatch(text) or os.path.exists(text):
        try:
            return HeadSet.from_pretrained(text)
        except OSError as error:
            raise ValueError(str(error)) from None
    out: dict[int | str, Any] = {}
    for part in text.split(";"):
        name, _, numbers = part.partition(":")
        layer = _layer(name)
        if layer in out:
            raise ValueError(f"it names the layer {name} twice")
        out[layer] = None
        if numbers != "*":
            each = [own.partition("@")[::2] for own in numbers.split(",")]
            out[layer] = {_count(head): _number(own or "1") for head, own in each}
            if not all(0 <= own <= 1 for own in out[layer].values()):
                raise ValueError(f"strengths of layer {name} must be from 0 to 1")
            if len(out[layer]) < len(each):
                raise ValueError(f"it names a head of layer {name} twice")
    return out


def _heads_text(value: Any) -> str:
    layers = value.layers if isinstance(value, HeadSet) else value
    texts = {layer: _numbers_text(chosen) for layer, chosen in layers.items()}
    return ";".join(f"{layer}:{text}" for layer, text in texts.items() if text)


def _numbers_text(chosen: Any) -> str:
    if chosen is None:
        return "*"
    if not isinstance(chosen, Mapping):
        chosen = dict.fromkeys([chosen] if isinstance(chosen, int) else chosen, 1.0)
    return ",".join(
        str(head) if strength == 1 else f"{head}@{float(strength)!r}"
        for head, strength in chosen.items()
    )


NUMBER = Kind("a finite number", _number, lambda value: repr(float(value)))
COUNT = Kind("a whole number", _count, str)
TEXT = Kind("a text", str, _text)
BOUND = Kind("a step as a whole number, or a share of the steps from 0.0 to 1.0", _bound, repr)
BLOCKS = Kind("numbers of blocks, as in 7,8,9", _counts, _list)
LAYERS = Kind("numbers or paths of attention layers, as in 3,5", _layers, _list)
HEADS = Kind(
    "layers with heads, as in 3:2,5;7:1 (3:* is all of layer 3, 7:1@0.5 has a strength), or a "
    "file, folder or hub id of a head set",
    _heads,
    _heads_text,
)
