"""Fifth stage: generate clips of held-out prompts, dense and by the chosen plans."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visattn.guidance.head_search.objectives import name_of
from visattn.plan import Plan
from visattn.search.arguments import PromptPair
from visattn.search.measure.clip_quality import clip_of
from visattn.search.measure.replay import Replay
from visattn.search.request import SearchRequest
from visattn.search.stages.observe import Observed
from visattn.search.stages.plan_errors import replayed_calls
from visattn.tasks.result_store import StoredResult
from visattn.tasks.runner import Task, TaskResult

__all__ = ["Validated", "step_speedups", "validate"]

TIMED_REPLAYS = 3  # after one that is not timed


@dataclass(frozen=True)
class Validated:
    """Clips of whole generations.

    Attributes:
        clips: ``(prompt, seed, result)``, each result of ``clip_of``.
        notes: for the receipt.
    """

    clips: tuple[tuple[str, int, StoredResult], ...]
    notes: tuple[str, ...]


def validate(
    request: SearchRequest, plans: Mapping[str, Plan], pairs: Sequence[PromptPair] | None = None
) -> Validated:
    """Generate clips, dense and by each plan, until the time budget ends.

    Args:
        request: the search.
        plans: by name; the videos of the first one are kept.
        pairs: prompts and seeds, whose videos are not kept; None: the held-out pairs.
    """
    runner = request.runner
    wanted = list(enumerate(request.held_out[: request.settings.pairs] if pairs is None else pairs))
    with_videos = request.settings.pictures if pairs is None else 0
    batch_size = runner.world if math.isfinite(request.deadline) else len(wanted)
    clips = []
    notes = []
    for begin in range(0, len(wanted), batch_size):
        if begin >= 2 and runner.broadcast(time.monotonic() > request.deadline):
            notes.append(f"the time budget ended after {begin} of {len(wanted)} clips")
            break
        batch = wanted[begin : begin + batch_size]
        tasks = [_task(request, plans, n, pair, n < with_videos) for n, pair in batch]
        results = runner.do("validate", tasks, timed=True)
        for (_, (prompt, seed)), result in zip(batch, results, strict=True):
            if result is not None:
                clips.append((prompt, seed, result))
    return Validated(tuple(clips), tuple(notes))


def _task(
    request: SearchRequest,
    plans: Mapping[str, Plan],
    number: int,
    pair: PromptPair,
    keep_videos: bool,
) -> Task:
    prompt, seed = pair

    def run() -> TaskResult:
        videos = ["dense", next(iter(plans))] if keep_videos else []
        job = request.target.job(prompt, seed)
        return clip_of(request.target.pipe, job, plans, request.scorer, videos, number)

    question = {
        "prompt": prompt,
        "seed": seed,
        "pictures": keep_videos,
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "scorer": None if request.scorer is None else name_of(request.scorer),
    }
    return Task(question, f"{prompt!r}, seed {seed}", run)


def step_speedups(
    request: SearchRequest, observed: Observed, replay: Replay, plans: Mapping[str, Plan]
) -> dict[str, float]:
    """Predict the speedups of whole generations from the seconds of replayed denoiser calls with
    and without each plan."""

    def run() -> TaskResult:
        least = dict.fromkeys(("", *plans), math.inf)
        for _ in range(1 + TIMED_REPLAYS):
            for name in least:
                least[name] = min(least[name], replay.seconds(plans.get(name)))
        return {"seconds": least}, {}

    question = {
        "plans": {name: plan.to_json() for name, plan in plans.items()},
        "calls": replayed_calls(request, replay),
    }
    (result,) = request.runner.do("steps", [Task(question, "steps", run)], alone=True)
    assert result is not None
    seconds = result.value["seconds"]
    replayed = sum(len(call.passes or ("any",)) for call in replay.calls)
    share = sum(observed.runs.values()) / replayed
    rest = observed.seconds - share * seconds[""]
    return {name: observed.seconds / (rest + share * seconds[name]) for name in plans}
