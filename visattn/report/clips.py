"""Dense and sparse videos beside each other, and what was measured on each pair."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from visattn.media.mp4_timing import Timing, timing_of
from visattn.report.markup import Html, figure, joined, put

__all__ = ["clips_html"]

FPS = 16  # where neither the file nor the settings say
SHORT = 3  # metrics in the list of clips
CONTROLS = put("""
<div class="transport" role="group" aria-label="Both videos" hidden>
<button type="button" data-do="play" aria-label="Play"></button>
<button type="button" data-do="back" aria-label="Previous frame"></button>
<input type="range" min="0" max="0" value="0" aria-label="Frame">
<button type="button" data-do="next" aria-label="Next frame"></button>
<output class="num"></output>
<select aria-label="Playing speed"><option>1</option><option>0.5</option><option>0.25</option>
</select>
<label><input type="checkbox"> difference</label>
</div>""".replace("\n", ""))
DIFFERENCE = put("""<figure class="difference" hidden>
<canvas role="img" aria-label="Difference of the two, four times"></canvas>
<figcaption><b>difference</b> 4 times, black where both agree</figcaption></figure>""")


def clips_html(clips: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Html:
    """The list of clips, their videos, and the controls that drive a pair.

    Raises:
        ValueError: a video is not base64.
    """
    return put(
        '<div class="aside"><fieldset class="choices" hidden><legend>Clips</legend>{}</fieldset>'
        '</div><div class="stage">{}{}</div>',
        joined(_choice(index, clip) for index, clip in enumerate(clips)),
        joined(_clip(index, clip, settings) for index, clip in enumerate(clips)),
        CONTROLS,
    )


def _metric(metric: Mapping[str, Any]) -> str:
    unit = metric.get("unit")
    return figure(metric.get("value"), f" {unit}" if unit else "")


def _choice(index: int, clip: Mapping[str, Any]) -> Html:
    facts = [f"seed {figure(clip.get('seed'))}"]
    facts += [f"{m.get('name')} {_metric(m)}" for m in (clip.get("metrics") or ())[:SHORT]]
    return put(
        '<label><input type="radio" name="clip" value="{}"{}><span>{}<small>{}</small></span>'
        "</label>",
        index,
        None if index else " checked",
        clip.get("prompt"),
        joined(put("<i>{}</i> ", fact) for fact in facts),
    )


def _clip(index: int, clip: Mapping[str, Any], settings: Mapping[str, Any]) -> Html:
    times = {
        side: _timing(clip.get(side), f"clips[{index}].{side}") for side in ("dense", "sparse")
    }
    known = times["dense"] or times["sparse"]
    metrics = joined(
        put(
            "<div><dt>{}</dt><dd>{}{}</dd></div>",
            metric.get("name"),
            _metric(metric),
            None if metric.get("dense") is None
            else put(" <small>dense {}</small>", figure(metric["dense"])),
        )
        for metric in clip.get("metrics") or ()
    )
    return put(
        '<article class="clip" data-fps="{}" data-frames="{}" style="--ratio:{}"><h3>{}</h3>'
        '<div class="pair">{}{}</div><dl class="figures">{}</dl></article>',
        known.fps if known else settings.get("fps") or FPS,
        known.frames if known else 0,
        round(known.width / known.height, 3) if known and known.height else 1,
        clip.get("prompt"),
        joined(_side(side, clip, time) for side, time in times.items()),
        DIFFERENCE if clip.get("dense") and clip.get("sparse") else None,
        metrics,
    )


def _timing(video: str | None, name: str) -> Timing | None:
    try:
        return timing_of(base64.b64decode(video, validate=True)) if video else None
    except binascii.Error as error:
        raise ValueError(f"{name} must be an mp4 in base64: {error}") from None


def _side(side: str, clip: Mapping[str, Any], time: Timing | None) -> Html:
    label, video = clip.get(f"{side}_label") or side, clip.get(side)
    seconds = (clip.get("seconds") or {}).get(side)
    verdict = (clip.get("verdict") or {}).get(side)
    facts = [*([] if seconds is None else [figure(seconds, " s")]), *([verdict] if verdict else [])]
    return put(
        "<figure>{}<figcaption><b>{}</b> {}</figcaption></figure>",
        put('<div class="absent">no video kept</div>') if not video
        else put(
            '<video src="data:video/mp4;base64,{}"{} preload="none" controls muted playsinline '
            'aria-label="{}: {}"></video>',
            video,
            put(' width="{}" height="{}"', time.width, time.height) if time else None,
            label,
            clip.get("prompt"),
        ),
        label,
        " · ".join(map(str, facts)),
    )
