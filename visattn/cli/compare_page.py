"""The page of ``visattn compare``: two synchronised clips and their difference."""

from __future__ import annotations

import base64
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import torch

from visattn._version import __version__
from visattn.media.video import encode_video
from visattn.metrics import Comparison

__all__ = ["page_of"]


def page_of(
    a: torch.Tensor, b: torch.Tensor, comparison: Comparison, numbers: Mapping[str, Any], fps: float
) -> dict[str, Any]:
    """Return the page as JSON values for ``visattn.report``.

    Args:
        a: frames ``[T, H, W, 3]`` in [0, 1].
        b: frames of the same shape.
        comparison: the comparison of B with A.
        numbers: the values that ``--json`` prints.
        fps: frames per second.

    Raises:
        ValueError: the frames cannot be encoded as an mp4.
    """
    sides = {name: numbers[name] for name in "ab"}
    labels = {name: str(side.get("path") or side.get("plan")) for name, side in sides.items()}
    seconds = {name: side.get("seconds") for name, side in sides.items()}
    psnr = "equal" if comparison.psnr.clip == float("inf") else f"{comparison.psnr.clip:.2f} dB"
    tiles = [
        {"label": "PSNR, B against A", "value": psnr, "note": ""},
        {"label": "SSIM", "value": _round(comparison.ssim.clip), "note": ""},
        {
            "label": "flicker",
            "value": _round(comparison.flicker.clip),
            "note": f"A {_words(comparison.reference_flicker.clip)}",
        },
    ]
    if seconds["a"] and seconds["b"]:
        speed = f"{seconds['a'] / seconds['b']:.2f}x"
        note = f"{seconds['b']:.2f} s against {seconds['a']:.2f} s, once each"
        tiles.insert(0, {"label": "B is faster by", "value": speed, "note": note})
    scalars = (str, int, float, bool)
    settings = {k: v for k, v in numbers.get("settings", {}).items() if isinstance(v, scalars)}
    videos = {
        name: base64.b64encode(encode_video(frames, fps=fps)).decode()
        for name, frames in (("dense", a), ("sparse", b))
    }
    metrics = [
        {"name": "PSNR", "value": _finite(comparison.psnr.clip), "unit": "dB", "dense": None},
        {"name": "SSIM", "value": _round(comparison.ssim.clip), "unit": "", "dense": None},
        {
            "name": "flicker",
            "value": _round(comparison.flicker.clip),
            "unit": "",
            "dense": _round(comparison.reference_flicker.clip),
        },
    ]
    return {
        "schema": "visattn.report/1",
        "kind": "compare",
        "title": f"{labels['b']} against {labels['a']}",
        "command": f"visattn {shlex.join(sys.argv[1:])}" if sys.argv[1:] else "",
        "machine": {"visattn": __version__, "torch": torch.__version__},
        "settings": settings,
        "headline": tiles,
        "clips": [
            {
                "prompt": numbers.get("prompt", f"{labels['a']} and {labels['b']}"),
                "seed": numbers.get("seed"),
                **videos,
                "dense_label": f"A: {labels['a']}",
                "sparse_label": f"B: {labels['b']}",
                "metrics": metrics,
                "verdict": None,
                "seconds": {"dense": seconds["a"], "sparse": seconds["b"]},
            }
        ],
        "notes": [
            f"{name.upper()}: {note}" for name in "ab" for note in sides[name].get("notes", ())
        ],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else round(value, 3)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _words(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
