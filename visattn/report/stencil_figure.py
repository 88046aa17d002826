"""Attention masses as bytes, so that the maps of a thousand heads fit into a page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

__all__ = ["stencil_data"]

DECADES = 2  # below its peak that a map shows


def stencil_data(stencils: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each stencil with ``mass`` and ``attention`` as ``{shape, peak, levels}``.

    Raises:
        ValueError: a map is no 3-D array of numbers, or its shape does not match its tiles.
    """
    return [_packed(index, stencil) for index, stencil in enumerate(stencils)]


def _packed(index: int, stencil: Mapping[str, Any]) -> dict[str, Any]:
    name = f"stencils[{index}]"
    keys = ("role", "number", "head", "tile", "count", "kept", "columns", "query")
    out = {key: stencil.get(key) for key in keys}
    around = [2 * int(count) - 1 for count in stencil["count"]]
    out["mass"] = _levels(stencil["mass"], around, f"{name}.mass")
    attention = stencil.get("attention")
    out["attention"] = (
        None if attention is None else _levels(attention, None, f"{name}.attention")
    )
    return out


def _levels(values: Any, shape: list[int] | None, name: str) -> dict[str, Any]:
    """Return bytes on a logarithmic scale: 255 is the peak, 1 at most a hundredth of it, 0 zero."""
    try:
        box = numpy.nan_to_num(numpy.asarray(values, dtype=numpy.float64))
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in lists of equal length") from None
    if box.ndim != 3 or (shape is not None and list(box.shape) != shape):
        wanted = "of three axes" if shape is None else f"of shape {shape}, 2 n - 1 per axis"
        raise ValueError(f"{name} of shape {list(box.shape)} must be {wanted}")
    peak = float(box.max(initial=0))
    share = numpy.maximum(box / peak if peak > 0 else box, 1e-300)
    level = 1 + numpy.rint(254 * numpy.clip(1 + numpy.log10(share) / DECADES, 0, 1))
    data = numpy.where(box > 0, level, 0).astype(numpy.uint8).tobytes()
    packed = base64.b64encode(data).decode()
    return {"shape": list(box.shape), "peak": peak, "levels": packed}
