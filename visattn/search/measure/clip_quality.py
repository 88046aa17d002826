"""Clips of whole generations, dense and with plans, and their metrics."""

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
from visattn.plan import Plan

__all__ = ["MOST_DB", "ClipScorer", "clip_of"]

MOST_DB = 80.0  # upper bound of a clip's PSNR in means; that of equal frames is infinite
# Verdicts by name, each from 0 to 1, of frames [T, H, W, 3] in [0, 1] and their prompt.
ClipScorer = Callable[[torch.Tensor, str], Mapping[str, float]]


def clip_of(
    pipe: Any,
    job: Job,
    plans: Mapping[str, Plan],
    scorer: ClipScorer | None,
    pictures: Sequence[str],
    turn: int,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Generate a clip with the dense pipeline and with each plan, from the same noise.

    Args:
        pipe: the pipeline.
        job: the generation.
        plans: the plans by name.
        scorer: judges the content of the frames. If it is None, there are no verdicts.
        pictures: names of the plans whose videos are kept; ``"dense"`` is one of these names.
        turn: number of the clip. The order of the plans rotates with it, so that a machine that
            becomes slower affects all plans.

    Returns:
        A dictionary with the seconds and verdicts of ``"dense"`` and of each plan, and the metrics
        of each plan against dense; and the videos by name, as bytes of an mp4.
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
        result = results[name]
        row: dict[str, Any] = {
            "seconds": result.seconds,
            "step_seconds": sum(result.step_seconds) / max(1, len(result.step_seconds)),
            "verdicts": {} if scorer is None else dict(scorer(result.frames, job.prompt)),
        }
        if name != "dense":
            compared = compare_frames(result.frames, dense)
            psnr = compared.psnr.clip
            assert psnr is not None
            row |= {
                "psnr": MOST_DB if not math.isfinite(psnr) else min(MOST_DB, psnr),
                "ssim": compared.ssim.clip,
                "flicker": compared.flicker.clip,
                "flicker_dense": compared.reference_flicker.clip,
            }
        value[name] = row
        if name in pictures:
            data = encode_video(result.frames, fps=result.settings.get("fps", FPS))
            videos[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return value, videos
