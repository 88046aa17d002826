"""Rewrites the former text form of guidances, ``softpag:heads=3:2,5;7:1,strength=0.5``, in the
present form. Records of older versions have the former form."""

from __future__ import annotations

import re

__all__ = ["in_present_form", "written_heads"]

CLASSES = {
    "softpag": "SoftPAG",
    "pag": "PAG",
    "seg": "SEG",
    "slg": "SLG",
    "slg-uncond": "SkipBlock",
    "stg": "STG",
    "temperature": "TemperatureGuidance",
    "tpg": "TokenPerturbation",
    "s2": "S2Guidance",
    "cfg-zero-star": "CFGZeroStar",
    "nag": "NAG",
    "enhance-a-video": "EnhanceVideo",
    "pladis": "PLADIS",
}
LAYER = r"(?:-?\d+|[A-Za-z_][\w.]*)"
HEAD = r"\d+(?:@[\d.eE+-]+)?"
HEADS = re.compile(rf"{LAYER}:(?:\*|{HEAD}(?:,{HEAD})*)(?:;{LAYER}:(?:\*|{HEAD}(?:,{HEAD})*))*")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def in_present_form(text: str) -> str | None:
    """Return a guidance text of the former form in the present one.

    Args:
        text: the text form of a guidance.

    Returns:
        The rewritten text; None where ``text`` is not of the former form.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if name not in CLASSES or not (colon or name.lower() != CLASSES[name].lower()):
        return None
    arguments = []
    for item in re.split(r",(?=[A-Za-z_]+=)", rest) if rest else ():
        key, _, value = item.partition("=")
        arguments.append(f"{key.strip()}={_literal(key.strip(), value.strip())}")
    if name == "slg-uncond":
        arguments.append("passes=['uncond']")
    return f"{CLASSES[name]}({', '.join(arguments)})"


def written_heads(text: str) -> str | None:
    """Return heads of the former form, ``3:2,5;7:1@0.5;8:*``, as a dict in the present one; None
    where ``text`` is not of the former form.

    Args:
        text: layers with heads, or a path.
    """
    if not HEADS.fullmatch(text):
        return None
    layers = []
    for layer_text in text.split(";"):
        layer, _, heads_text = layer_text.partition(":")
        heads = [head.partition("@")[::2] for head in heads_text.split(",")]
        if heads_text == "*":
            written = "None"
        elif all(float(strength or 1) == 1 for _, strength in heads):
            written = f"[{', '.join(head for head, _ in heads)}]"
        else:
            written = ", ".join(f"{head}: {float(strength or 1)!r}" for head, strength in heads)
            written = f"{{{written}}}"
        layers.append(f"{_number_or_text(layer)}: {written}")
    return f"{{{', '.join(layers)}}}"


def _literal(key: str, value: str) -> str:
    if key == "heads":
        return written_heads(value) or repr(value)
    if key in ("layers", "blocks"):
        return f"[{', '.join(_number_or_text(item) for item in value.split(','))}]"
    return repr(value) if key == "negative_prompt" else _number_or_text(value)


def _number_or_text(text: str) -> str:
    return text if NUMBER.fullmatch(text) else repr(text)
