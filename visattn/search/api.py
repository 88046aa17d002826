"""``visattn.search``: find a plan for a pipeline from a few prompts, with a receipt."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from visattn._arguments import check_count
from visattn.patterns import HeadPattern
from visattn.runtime.processes import join
from visattn.runtime.progress import Progress
from visattn.search.arguments import Settings, read_budget, read_goal, split_prompts
from visattn.search.candidate_choice import CandidateChoice
from visattn.search.measure.clip_quality import ClipScorer
from visattn.search.measure.target import SearchTarget
from visattn.search.request import SearchRequest, runner_of
from visattn.search.result import SearchResult
from visattn.search.run import run_search

__all__ = ["search"]


def search(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    also: Sequence[Mapping[str, Any]] = (),
    target_speedup: float | None = None,
    max_error: float | None = None,
    min_psnr: float | None = None,
    budget: str | float | None = None,
    phases: int = 1,
    candidates: Sequence[str | HeadPattern] | None = None,
    seeds: Sequence[int] = (0,),
    held_out: Sequence[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    scorer: ClipScorer | None = None,
    model: str | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find which attention each head of a pipeline needs at a shape, and what that costs.

    A search has five stages:

    1. It times dense generations.
    2. It reads their attention and records calls of the denoiser.
    3. It measures the error and the seconds of every candidate.
    4. It makes plans for several speeds, plans with one pattern for all heads, and the plans of
       published rules. It judges them by the error of the model output on the dense trajectory.
    5. It generates clips of held-out prompts, dense and with the chosen plan.

    Args:
        pipe: a diffusers pipeline of a known family. The search removes a plan that it has.
        prompts: a few prompts to calibrate on. Stencils are learned from the first half, and
            candidates are scored on the other half.
        call: arguments of the pipeline's call: ``height``, ``width``, ``num_frames``,
            ``num_inference_steps``, ``guidance_scale``, ``negative_prompt``.
        also: other shapes that the plan is for, each as the fields of ``call`` that differ. Losses
            are means over all shapes, and the plan reaches the speed at each of them (as MoA's
            constraint for several lengths; Fu et al. 2024, arXiv 2406.14909). The validation uses
            ``call``.
        target_speedup: choose the plan of least error at this speedup of a whole generation,
            above 1.
        max_error: choose the fastest plan with at most this error of the denoiser's output,
            ``|e' - e|^2 / |e|^2`` with guidance, teacher-forced. It is 0.05 if no goal is given.
        min_psnr: choose the fastest plan whose videos have this PSNR against dense, in dB.
        budget: time after which the validation starts no further clip: a text such as ``"10m"``,
            or seconds.
        phases: number of equal parts of the denoising steps, each with its own patterns.
        candidates: names of families, or patterns. All families are tried if it is None.
        seeds: seeds of the calibration, one for each prompt in turn. Held-out clips have other
            seeds.
        held_out: prompts of the validation. If it is None, every second prompt of ``prompts`` is
            held out, and a single prompt is used with other seeds.
        resume: folder for all intermediate results. An interrupted search with the same arguments
            resumes from it. The processes of ``torchrun`` share the folder and the work.
        settings: how much is measured.
        scorer: function of the frames of a clip, float32 ``[T, H, W, 3]`` in [0, 1], and its
            prompt. It returns verdicts by name, each from 0 to 1. The receipt counts how many
            differ between dense and sparse clips. If it is None, clips are compared only by PSNR,
            SSIM and flicker, and the receipt says so.
        model: name of the model, for the receipt.
        command: command line, for the receipt.
        progress: called after each task with the stage, the number of finished tasks, the number
            of all tasks, and the seconds left of the stage or None.

    Returns:
        The plan and the receipt.

    Raises:
        TypeError: an argument has the wrong type, or ``pipe`` is no pipeline.
        ValueError: an argument is wrong, or no plan reaches the goal.
        OSError: the folder cannot be created.

    Example:
        >>> import visattn
        >>> prompts = ["a red square moves left", "a blue circle"]
        >>> result = visattn.search(pipe, prompts, target_speedup=1.35)  # doctest: +SKIP
        >>> page = result.save("my-plan")  # doctest: +SKIP
        >>> visattn.search(pipe, prompts, target_speedup=0.5)
        Traceback (most recent call last):
            ...
        ValueError: target_speedup=0.5 must be a number above 1
    """
    begin = time.monotonic()
    goal = read_goal(target_speedup, max_error, min_psnr)
    check_count("phases", phases, 1)
    deadline = begin + read_budget(budget)
    settings = settings or Settings()
    calibration, unseen = split_prompts(prompts, held_out, seeds, settings.pairs)
    target = SearchTarget(pipe, call or {}, model)
    choice = CandidateChoice(tuple(candidates or ()))
    with join("a search") as group:
        request = SearchRequest(
            target,
            calibration,
            unseen,
            runner_of(target, resume, progress, group),
            phases=tuple(n / phases for n in range(1, phases)),
            candidates=choice,
            settings=settings,
            scorer=scorer,
            deadline=deadline,
        )
        return run_search(request, also, goal, command, begin)
