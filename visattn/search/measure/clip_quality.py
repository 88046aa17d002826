"""Whole generations of prompts that the search has not used, dense and by plans, clip by clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from visattn.generation import Job, Result, run_job
from visattn.generation.job import FPS
from visattn.inject import sparse
from visattn.media.video import encode_video
from visattn.metrics import compare_frames
from visattn.metrics.prompt import parse_caption, score_prompt
from visattn.plan import Plan

__all__ = ["MOST_DB", "ClipScorer", "caption_scorer", "clip_of"]

MOST_DB = 80.0  # of a clip in means; equal frames have no PSNR
# Verdicts by name, each 0 or 1 or between, of frames [T, H, W, 3] in [0, 1] and their prompt.
ClipScorer = Callable[[torch.Tensor, str], Mapping[str, float]]


def caption_scorer(frames: torch.Tensor, prompt: str) -> dict[str, float]:
    """Whether a video shows the colour, object and direction of its caption (``metrics.prompt``);
    nothing for prompts that are no such captions."""
    try:
        parse_caption(prompt)
    except ValueError:
        return {}
    found = score_prompt(frames.permute(0, 3, 1, 2), prompt)
    return {"colour": found.colour, "object": found.object, "direction": found.direction}


def clip_of(
    pipe: Any,
    job: Job,
    plans: Mapping[str, Plan],
    scorer: ClipScorer,
    pictures: Sequence[str],
    turn: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A prompt by the dense pipeline and by each plan, from the same noise.

    Args:
        pictures: names of the plans whose video is kept, and ``"dense"``.
        turn: of the clip; plans run in an order that moves on with it, so that a machine that
            slows down slows all of them.

    Returns:
        For ``"dense"`` and each plan the seconds and verdicts, for plans the metrics against dense;
        and videos as bytes of an mp4.
    """
    names = ["dense", *plans]
    order = names[turn % len(names) :] + names[: turn % len(names)]
    results: dict[str, Result] = {}
    for name in order:
        plan = plans.get(name)
        with nullcontext() if plan is None else sparse(pipe, plan, guard=False):
            results[name] = run_job(pipe, job)
    dense = results["dense"].frames
    value: dict[str, Any] = {}
    videos: dict[str, torch.Tensor] = {}
    for name in names:
        found = results[name]
        own: dict[str, Any] = {
            "seconds": found.seconds,
            "step_seconds": sum(found.step_seconds) / max(1, len(found.step_seconds)),
            "verdicts": dict(scorer(found.frames, job.prompt)),
        }
        if name != "dense":
            compared = compare_frames(found.frames, dense)
            psnr = compared.psnr.clip
            assert psnr is not None
            own |= {
                "psnr": MOST_DB if not math.isfinite(psnr) else min(MOST_DB, psnr),
                "ssim": compared.ssim.clip,
                "flicker": compared.flicker.clip,
                "flicker_dense": compared.reference_flicker.clip,
            }
        value[name] = own
        if name in pictures:
            data = encode_video(found.frames, fps=found.settings.get("fps", FPS))
            videos[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return value, videos
