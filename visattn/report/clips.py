"""Dense and sparse videos side by side, and what was measured on each pair."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from visattn.media.mp4_timing import Timing, timing_of
from visattn.report.figures import figure
from visattn.report.templating import render

__all__ = ["clips_html"]

FPS = 16  # where neither the file nor the settings name it
SHORT = 3  # metrics in the list of clips


def clips_html(clips: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Markup:
    """Return the list of clips, their videos, and the controls of a pair.

    Raises:
        ValueError: a video is not base64.
    """
    shown = [_clip(index, clip, settings) for index, clip in enumerate(clips)]
    return render("clips", clips=shown)


def _metric(metric: Mapping[str, Any]) -> str:
    unit = metric.get("unit")
    return figure(metric.get("value"), f" {unit}" if unit else "")


def _clip(index: int, clip: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    timings = {
        side: _timing(clip.get(side), f"clips[{index}].{side}") for side in ("dense", "sparse")
    }
    known = timings["dense"] or timings["sparse"]
    metrics = clip.get("metrics") or ()
    facts = [f"seed {figure(clip.get('seed'))}"]
    facts += [f"{metric.get('name')} {_metric(metric)}" for metric in metrics[:SHORT]]
    return {
        "prompt": clip.get("prompt"),
        "facts": facts,
        "fps": known.fps if known else settings.get("fps") or FPS,
        "num_frames": known.frames if known else 0,
        "ratio": round(known.width / known.height, 3) if known and known.height else 1,
        "sides": [_side(side, clip, timing) for side, timing in timings.items()],
        "has_both": bool(clip.get("dense") and clip.get("sparse")),
        "metrics": [
            {"name": metric.get("name"), "text": _metric(metric), "dense": metric.get("dense")}
            for metric in metrics
        ],
    }


def _side(side: str, clip: Mapping[str, Any], timing: Timing | None) -> dict[str, Any]:
    seconds = (clip.get("seconds") or {}).get(side)
    verdict = (clip.get("verdict") or {}).get(side)
    facts = [*([] if seconds is None else [figure(seconds, " s")]), *([verdict] if verdict else [])]
    return {
        "label": clip.get(f"{side}_label") or side,
        "video": clip.get(side),
        "timing": timing,
        "facts": " · ".join(map(str, facts)),
    }


def _timing(video: str | None, name: str) -> Timing | None:
    try:
        return timing_of(base64.b64decode(video, validate=True)) if video else None
    except binascii.Error as error:
        raise ValueError(f"{name} must be an mp4 in base64: {error}") from None
