"""Fourth stage: make plans for several speeds, and judge them by the model's own output."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visattn.geometry.layout import TokenLayout
from visattn.patterns import Dense, HeadPattern, Pattern
from visattn.plan import Plan
from visattn.search.request import SearchRequest
from visattn.search.solve.assignments import (
    LayerFronts,
    meeting,
    solutions,
    uniform_plans,
)
from visattn.search.solve.evaluated_plan import EvaluatedPlan
from visattn.search.solve.price_table import Assignment, Group
from visattn.search.solve.published_rules import published_rules
from visattn.search.stages.observe import Observed
from visattn.search.stages.plan_errors import PlanErrors
from visattn.search.stages.price import Priced

__all__ = ["Judged", "judge"]

SPEEDUPS = (1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
REFINEMENTS = 2  # of a plan, at most
LAYER_POINTS = 5  # options of a layer's front whose error is measured in isolation
UNIFORM_ELSEWHERE = 3  # families tried at other speeds than the target

LayerErrors = Mapping[Group, Sequence[tuple[float, float]]]  # (loss, error) of some options


@dataclass(frozen=True)
class Judged:
    """Plans with the error of the model's own output under each.

    Attributes:
        plans: in the order in which they were made.
        notes: for the receipt.
    """

    plans: tuple[EvaluatedPlan, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _ToJudge:
    """A plan before it is judged: how it was made, and one pattern for all heads or an
    assignment."""

    name: str
    kind: str
    target_speedup: float | None
    heads: HeadPattern | Assignment


def judge(
    request: SearchRequest,
    observed: Observed,
    priced: Priced,
    errors: PlanErrors,
    target_speedup: float | None,
) -> Judged:
    """Make plans for every speed that can be reached, and judge them.

    Args:
        request: the search.
        observed: result of the first stage.
        priced: result of the third stage; its table has the other shapes too.
        errors: measures the errors of plans.
        target_speedup: a further speed to make plans for. The plans with one pattern and those of
            published rules are made for it.
    """
    notes: list[str] = []
    every = LayerFronts(priced.table)
    by_layer = _layer_errors(request, observed, every, errors, notes)
    evaluate = functools.partial(_evaluated, priced, observed.layout, errors)
    fronts = _fronts(every, priced)
    to_judge: list[_ToJudge] = []
    reached = []
    for speed in sorted({*SPEEDUPS, *([target_speedup] if target_speedup else [])}):
        assignments = solutions(priced.table, speed, fronts, by_layer)
        if not assignments:
            break
        reached.append(speed)
        to_judge += [_ToJudge(name, "searched", speed, x) for name, x in assignments.items()]
    main = _main_speed(reached, target_speedup)
    to_judge += _uniform(priced, errors, reached, main, notes)
    if main:
        to_judge += [
            _ToJudge(name, "random" if name == "random" else "published rule", main, assignment)
            for name, assignment in published_rules(priced.table, main).items()
        ]
    plans = evaluate(to_judge)
    index = reached.index(main) if main else 0
    for speed in reached[max(0, index - 1) : index + 2]:  # those that will be validated
        searched = [x for x in plans if x.target_speedup == speed and x.kind == "searched"]
        best = min(searched, key=lambda x: x.error)
        plans += _refined(best, every, by_layer, errors, evaluate)
    return Judged(tuple(plans), tuple(notes))


def _main_speed(reached: Sequence[float], target_speedup: float | None) -> float | None:
    """Return the target if it is reached, else the middle one of the reached speeds, or None."""
    if target_speedup in reached:
        return target_speedup
    return reached[len(reached) // 2] if reached else None


def _fronts(every: LayerFronts, priced: Priced) -> dict[str, LayerFronts]:
    """Return the fronts of all candidates, of some, and by other losses."""
    table = priced.table

    def is_static(_: str, pattern: HeadPattern) -> bool:
        return isinstance(pattern, Pattern)

    return {
        "all": every,
        "static": LayerFronts(table, is_static),
        "stencils": LayerFronts(table, lambda family, _: family == "stencil"),
        "output": LayerFronts(table, loss="output"),
        "mass": LayerFronts(table, is_static, loss="mass"),
    }


def _layer_errors(
    request: SearchRequest,
    observed: Observed,
    every: LayerFronts,
    errors: PlanErrors,
    notes: list[str],
) -> LayerErrors:
    """Measure the model's own error when one layer at a time takes options of its front, as far as
    the time budget allows."""
    points = _points(request, observed, len(every.fronts), errors, notes)
    measured: list[tuple[Group, float, Plan]] = []
    for group, front in every.fronts.items() if points else ():
        sparse = [option for option in front if option.loss > 0]
        count = min(points, len(sparse))
        for n in range(count):
            option = sparse[n * (len(sparse) - 1) // max(1, count - 1)]
            patterns = every.table.patterns(group, option.choice)
            measured.append((group, option.loss, every.table.plan({group: patterns})))
    values = errors([plan for _, _, plan in measured], "layers")
    by_layer: dict[Group, list[tuple[float, float]]] = {}
    for (group, loss, _), error in zip(measured, values, strict=True):
        by_layer.setdefault(group, []).append((loss, error))
    return by_layer


def _points(
    request: SearchRequest, observed: Observed, groups: int, errors: PlanErrors, notes: list[str]
) -> int:
    """Return how many options of each layer can be measured in time: none, or several."""
    call_seconds = observed.seconds / sum(observed.runs.values())
    _, replay = errors.shapes[0]
    budget = request.settings.layer_seconds
    points = int(budget / (call_seconds * len(replay.calls) * groups))
    if points < 2:
        notes.append(
            "layers are weighed by the error of their attention alone: measuring each layer's "
            f"effect on the model output would take more than layer_seconds={budget:g}"
        )
        return 0
    return min(LAYER_POINTS, points)


def _uniform(
    priced: Priced,
    errors: PlanErrors,
    reached: Sequence[float],
    main: float | None,
    notes: list[str],
) -> list[_ToJudge]:
    """Return plans with one pattern for all heads: of all families at the main speed, of the best
    few at others, and dynamic rules at their own budgets."""
    table = priced.table
    families: dict[str, list[HeadPattern]] = {}
    for family, pattern in (*priced.pool.static, *priced.rules):
        families.setdefault(family, []).append(pattern)
    dynamic = dict.fromkeys(family for family, _ in priced.rules)
    to_judge: list[_ToJudge] = []
    error_of: dict[str, float] = {}
    for speed in [main, *[x for x in reached if x != main]] if main else []:
        chosen = uniform_plans(table, speed, families)
        if speed != main:
            best = sorted(error_of, key=lambda family: error_of[family])[:UNIFORM_ELSEWHERE]
            chosen = {family: x for family, x in chosen.items() if family in best}
        plans = [table.plan(table.uniform(pattern)) for pattern in chosen.values()]
        values = errors(plans, "plans")
        if speed == main:
            error_of = dict(zip(chosen, values, strict=True))
        for family, pattern in chosen.items():
            kind = "uniform dynamic" if family in dynamic else "uniform static"
            to_judge.append(_ToJudge(family, kind, speed, pattern))
    fast = {x.name for x in to_judge}
    slow = [family for family in families if main and family not in fast]
    if slow:
        notes.append(
            f"one pattern for all heads does not reach {main:g}x here with: {', '.join(slow)}"
        )
    for family in dynamic:  # also the slow ones
        patterns = families[family]
        to_judge += [_ToJudge(family, "uniform dynamic", None, pattern) for pattern in patterns]
    return to_judge


def _evaluated(
    priced: Priced, layout: TokenLayout, errors: PlanErrors, to_judge: Sequence[_ToJudge]
) -> list[EvaluatedPlan]:
    """Judge plans."""
    table = priced.table
    assignments = [
        table.uniform(x.heads) if isinstance(x.heads, HeadPattern) else x.heads for x in to_judge
    ]
    plans = [table.plan(assignment) for assignment in assignments]
    return [
        EvaluatedPlan(
            name=x.name,
            kind=x.kind,
            target_speedup=x.target_speedup,
            plan=plan,
            heads=assignment,
            pattern=repr(x.heads) if isinstance(x.heads, HeadPattern) else None,
            predicted=table.speedup(assignment) if table.known(assignment) else None,
            error=error,
            density=density_of(assignment, layout),
        )
        for x, assignment, plan, error in zip(
            to_judge, assignments, plans, errors(plans, "plans"), strict=True
        )
    ]


def _refined(
    best: EvaluatedPlan,
    every: LayerFronts,
    by_layer: LayerErrors,
    errors: PlanErrors,
    evaluate: functools.partial[list[EvaluatedPlan]],
) -> list[EvaluatedPlan]:
    """Make a plan again with each layer weighed by how much less the model's own error is when that
    layer alone is dense; repeat as long as the plan becomes better."""
    table = every.table
    refined: list[EvaluatedPlan] = []
    for _ in range(REFINEMENTS if by_layer and best.target_speedup else 0):
        sparse = [
            group
            for group, heads in best.heads.items()
            if any(pattern != Dense() for pattern in heads)
        ]
        without = [
            table.plan({g: heads for g, heads in best.heads.items() if g != group})
            for group in sparse
        ]
        weights = {
            group: max(0.0, best.error - error)
            / max(1e-12, every.error_of(group, best.heads[group], by_layer))
            for group, error in zip(sparse, errors(without, "refine"), strict=True)
        }
        assert best.target_speedup is not None
        assign = functools.partial(every.across, fronts=every.measured(by_layer, weights))
        assignment = meeting(table, best.target_speedup, assign)
        if assignment is None:
            break
        name = "error by layer, refined"
        (candidate,) = evaluate([_ToJudge(name, "searched", best.target_speedup, assignment)])
        if candidate.error >= best.error:
            break
        refined.append(candidate)
        best = candidate
    return refined


def density_of(assignment: Assignment, layout: TokenLayout) -> float | None:
    """Return the mean kept share of the pairs over heads; None with a dynamic pattern."""
    heads = [pattern for patterns in assignment.values() for pattern in patterns]
    static = [pattern for pattern in heads if isinstance(pattern, Pattern)]
    if len(static) < len(heads):
        return None
    density = {pattern: pattern.density(layout) for pattern in set(static)}
    return sum(density[pattern] for pattern in static) / len(static)
