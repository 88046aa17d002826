"""``search_heads``: a greedy search, in rounds, for the heads whose perturbation guides best
(HeadHunter of "Where and How to Perturb", Ahn et al. 2025, arXiv 2506.10978)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from visattn._arguments import check_count
from visattn._version import __version__, versions
from visattn.guidance.guiders.soft_pag import Policy, SoftPAG
from visattn.guidance.head_search.batched_trials import BatchedTrials
from visattn.guidance.head_search.greedy_rounds import GreedyRounds
from visattn.guidance.head_search.head_candidates import (
    heads_of,
    plans_of,
    read_call,
    read_candidates,
    read_kept,
    read_pairs,
)
from visattn.guidance.head_search.head_log import HeadLog
from visattn.guidance.head_search.objectives import Objective, name_of
from visattn.guidance.head_search.search_progress import SearchProgress
from visattn.guidance.head_search.set_scores import SetScores
from visattn.guidance.head_set import HeadSet
from visattn.inject.models.denoisers import describe, known_denoisers
from visattn.inject.models.fingerprint import fingerprint
from visattn.inject.searchable import check_searchable
from visattn.plan.json_format import shown
from visattn.runtime.processes import join
from visattn.runtime.progress import Progress

__all__ = ["search_heads"]

logger = logging.getLogger("visattn")


def search_heads(
    pipe: Any,
    objective: Objective,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    k: int = 1,
    rounds: int = 1,
    strength: float = 1.0,
    scale: float = 3.0,
    policy: Policy = "all",
    target: str = "value",
    candidates: HeadSet | Mapping[int | str, object] | None = None,
    batch: int = 1,
    call: Mapping[str, Any] | None = None,
    keep: HeadSet | Mapping[int | str, object] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> HeadSet:
    """Find the heads whose perturbation improves the frames of a pipeline.

    Each round tries every candidate that is left. It generates every prompt with every seed,
    guided by ``SoftPAG`` with the heads that were found so far and the candidate. Then it adds the
    ``k`` candidates with the largest mean objective; of equal ones, those with the lower layer and
    head index. A search needs about ``rounds * candidates * prompts * seeds`` generations.

    Args:
        pipe: a diffusers pipeline of a known family, with or without a plan.
        objective: a function of frames, float32 ``[T, H, W, 3]`` in [0, 1] on the CPU, and their
            prompt. It returns a number; larger is better. There is no default.
        prompts: texts to generate.
        seeds: every prompt is generated with every seed, for all heads alike.
        k: heads that a round adds. The paper has 24 for general quality, with one round and 20
            prompts; 3 for a style, with 5 rounds and 5 seeds.
        rounds: number of rounds.
        strength: strength of the heads, as of SoftPAG. The result has it too, as it has the next
            three.
        scale: ``w`` of the guidance, as of SoftPAG.
        policy: which tokens of joint attention are perturbed, as of SoftPAG.
        target: what heads are moved towards, as of SoftPAG.
        candidates: heads to try, by layer, as of SoftPAG; None means all heads of all layers of
            self-attention or joint attention.
        batch: candidates that are generated as samples of one call of the pipeline. Each sample
            has the noise that it would have alone; the frames are equal up to rounding. The batch
            is halved when memory runs out.
        call: arguments of the call of the pipeline, such as ``num_inference_steps``.
        keep: heads that are perturbed from the start and are part of the result, by layer, as of
            SoftPAG. Their strengths are multiplied by ``strength``.
        resume: a file to which every score is added as soon as it is known. A search with the same
            settings resumes from it, also with more rounds or another ``k``. None: no file. With
            ``torchrun`` the processes share the generations, and the first one writes the file.
        progress: called as ``progress(stage, done, total, seconds_left)`` after each generation;
            ``visattn.runtime.progress.ProgressBar()`` shows a bar.

    Returns:
        The heads. ``provenance`` lists the rounds, the mean objective without and with the heads,
        and the candidates that failed. A candidate fails if its objective raises an exception or
        returns no finite number, or if memory runs out. It is not tried again in this search, and
        a warning at the end names it. If no candidate is left, there are fewer heads. To try a
        failed candidate again, delete its line in the file.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the pipeline has a cache, is edited or is
            parallel; ``resume`` is of other settings; the objective fails without any candidate;
            all candidates fail.
        OSError: the file cannot be read or written.

    Example:
        >>> from visattn import search_heads
        >>> def mean_red(frames, prompt):
        ...     return float(frames[..., 0].mean())
        >>> size = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 1}
        >>> heads = search_heads(pipe, mean_red, ["a cat"], candidates={1: [0, 2]}, call=size)
        >>> len(heads), heads.provenance["candidates"]
        (1, 2)

    Source:
        Ahn et al. (2025), "Where and How to Perturb", arXiv
        2506.10978. Code: github.com/cvlab-kaist/HeadHunter (commit 3828d1c).
    Default:
        code.
    Differences:
        - Candidates that fail are left out, and the search continues.
    """
    if not callable(objective):
        raise TypeError(
            f"objective={shown(objective)} must be a function of frames [T, H, W, 3] and their "
            "prompt that returns a number"
        )
    for name, count in (("k", k), ("rounds", rounds), ("batch", batch)):
        check_count(name, count, 1)
    pairs = read_pairs(prompts, seeds)
    SoftPAG(None, strength, scale, policy=policy, target=target)  # type: ignore[arg-type]
    if not strength or not scale:
        raise ValueError(
            f"strength={strength!r} and scale={scale!r} must not be 0, which perturbs nothing"
        )
    num_heads = heads_of(pipe)
    check_searchable(pipe)
    trials = BatchedTrials(pipe, read_call(pipe, call), num_heads, strength, scale, policy, target)
    kept = read_kept(keep, num_heads)
    to_try = read_candidates(candidates, num_heads, kept)
    if len(to_try) < k * rounds:
        raise ValueError(
            f"k={k} heads in each of rounds={rounds} are more than the {len(to_try)} candidates"
        )
    settings = {
        "versions": versions(("torch", "diffusers", "transformers")),
        "pipeline": type(pipe).__name__,
        "whole pipeline": fingerprint(pipe),
        "dtype": str(getattr(pipe, "dtype", None)),
        "scheduler": _scheduler(pipe),
        "plan": plans_of(pipe),
        "objective": name_of(objective),
        "pairs": [list(pair) for pair in pairs],
        "call": trials.call,
        "strength": strength,
        "scale": scale,
        "policy": policy,
        "target": target,
    }
    with join("a search for heads") as group:
        group.check_same(settings, "model, call or other setting")
        with closing(HeadLog(resume if group.process.first else None, settings)) as log:
            log.scores = group.of_first(log.scores)
            counter = SearchProgress(progress, group.process.world)
            search = GreedyRounds(SetScores(trials, objective, pairs, batch, log, group, counter))
            heads = search.run(kept, to_try, k, rounds)
    if search.failures:
        logger.warning(
            "search_heads left out %d of %d candidates: %s",
            len(search.failures),
            len(to_try),
            "; ".join(f"{row['item']}: {row['error']}" for row in search.failures),
        )
    _, (model, family) = next(iter(known_denoisers(pipe).items()))
    denoiser = describe(model, family)
    return HeadSet(
        heads,
        model=denoiser.kind,
        size=(denoiser.layers, denoiser.heads),
        strength=float(strength),
        scale=float(scale),
        policy=policy,
        target=target,
        objective=name_of(objective),
        provenance={
            "kind": "searched",
            "k": k,
            "rounds": search.rounds,
            "score": {"without": search.before, "with": search.after},
            "candidates": len(to_try),
            "failures": search.failures,
            "pairs": settings["pairs"],
            "call": trials.call,
            "fingerprint": settings["whole pipeline"],
            "visattn": __version__,
        },
    )


def _scheduler(pipe: Any) -> str:
    """Return the class of a pipeline's scheduler and its configuration."""
    scheduler = getattr(pipe, "scheduler", None)
    config = {k: v for k, v in getattr(scheduler, "config", {}).items() if not k.startswith("_")}
    return f"{type(scheduler).__name__} {sorted(config.items())}"
