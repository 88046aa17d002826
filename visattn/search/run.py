"""The run of a search: five stages, the choice of a plan, its validation, and the receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from visattn.patterns import Skip
from visattn.search.arguments import SEED_OFFSET, Goal
from visattn.search.clip_statistics import ClipStatistics
from visattn.search.comparison import Comparison, best_by_speed
from visattn.search.receipt import Searched, attention_share, write_receipt
from visattn.search.request import SearchRequest
from visattn.search.result import SearchResult
from visattn.search.solve.evaluated_plan import EvaluatedPlan
from visattn.search.stages.calibrate import calibrate
from visattn.search.stages.judge import judge
from visattn.search.stages.observe import Observed, observe_dense
from visattn.search.stages.plan_errors import PlanErrors
from visattn.search.stages.price import Priced, price
from visattn.search.stages.validate import step_speedups, validate

__all__ = ["run_search"]

CHOOSING_CLIPS = 4  # clips that decide whether a plan reaches min_psnr; none is held out


def run_search(
    request: SearchRequest,
    also: Sequence[Mapping[str, Any]],
    goal: Goal,
    command: str | None,
    begin: float,
) -> SearchResult:
    """Run all stages of a search, from dense generations to the receipt.

    Args:
        request: the search.
        also: calls of the pipeline at other shapes that the plan is for.
        goal: which plan is chosen.
        command: the command line, for the receipt.
        begin: ``time.monotonic()`` at the start.

    Raises:
        ValueError: no plan is faster than dense, or none reaches the goal.
        Unfinished: all tasks of a stage failed.
    """
    requests = [request, *(request.at_shape(call) for call in also)]
    observed = [observe_dense(x) for x in requests]
    calibrated = [calibrate(x, y) for x, y in zip(requests, observed, strict=True)]
    shapes = list(zip(requests, observed, calibrated, strict=True))
    priced = price(*shapes[0])
    tables = tuple(price(*shape, like=priced).table for shape in shapes[1:])
    priced = replace(priced, table=replace(priced.table, also=tables))
    errors = PlanErrors([(x, y.replay) for x, _, y in shapes])
    judged = judge(request, observed[0], priced, errors, goal.target_speedup)
    front = best_by_speed(judged.plans)
    check_reached(goal, front, observed[0], priced)
    chosen, choosing_notes = choose(request, front, goal)
    comparison = Comparison(judged.plans, front, chosen)
    plans = {name: evaluated.plan for name, evaluated in comparison.named.items()}
    steps = step_speedups(request, observed[0], calibrated[0].replay, plans)
    validated = validate(request, plans)
    return write_receipt(
        Searched(
            request=request,
            goal=goal,
            observed=observed[0],
            calibrated=calibrated[0],
            priced=priced,
            comparison=comparison,
            steps=steps,
            clips=ClipStatistics(validated.clips),
            notes=[*priced.notes, *judged.notes, *choosing_notes, *validated.notes],
            command=command,
            begin=begin,
        )
    )


def check_reached(
    goal: Goal, front: Mapping[float, EvaluatedPlan], observed: Observed, priced: Priced
) -> None:
    """Raise ValueError where no plan is faster than dense, or none has the target speedup."""
    table = priced.table
    if not front:
        raise ValueError(
            "no plan is faster than dense here, where attention is "
            f"{attention_share(observed, priced):.0%} of a generation, "
            f"{1e3 * table.times.dense:.3g} ms in a layer; sparse attention saves more with more "
            "tokens or more steps"
        )
    if goal.target_speedup is not None and goal.target_speedup not in front:
        raise ValueError(
            f"target_speedup={goal.target_speedup} is out of reach: the fastest plan is "
            f"{max(front):g}x; skipping attention altogether would give "
            f"{table.speedup(table.uniform(Skip())):.2f}x"
        )


def choose(
    request: SearchRequest, front: Mapping[float, EvaluatedPlan], goal: Goal
) -> tuple[EvaluatedPlan, tuple[str, ...]]:
    """Return the plan of the front that the goal names, and notes for the receipt.

    Raises:
        ValueError: no plan meets the goal.
    """
    if goal.target_speedup is not None:
        return front[goal.target_speedup], ()
    speeds = sorted(front)
    notes: tuple[str, ...] = ()
    if goal.max_error is not None:
        within = [speed for speed in speeds if front[speed].error <= goal.max_error]
    else:
        assert goal.min_psnr is not None
        pairs = [(text, seed + SEED_OFFSET // 2) for text, seed in request.prompts[:CHOOSING_CLIPS]]
        plans = {f"{speed:g}": front[speed].plan for speed in speeds}
        validated = validate(request, plans, pairs)
        clips, notes = ClipStatistics(validated.clips), validated.notes
        within = [speed for speed in speeds if clips.psnr(f"{speed:g}").mean >= goal.min_psnr]
    if not within:
        ((name, value),) = goal.given.items()
        raise ValueError(
            f"{name}={value:g} is met by no plan that is faster than dense: the slowest, "
            f"{speeds[0]:g}x, has an error of {front[speeds[0]].error:.3g}; relax the goal"
        )
    return front[max(within)], notes
