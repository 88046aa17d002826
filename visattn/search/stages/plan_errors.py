"""The error of the model's own output under a plan, on recorded calls of the denoisers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from visattn.plan import Plan
from visattn.search.measure.replay import Replay
from visattn.search.request import SearchRequest
from visattn.tasks.runner import Task

__all__ = ["PlanErrors", "replayed_calls"]


@dataclass(frozen=True)
class PlanErrors:
    """Measures the errors of plans at one or several shapes.

    Args:
        shapes: the search at each shape, with the recorded calls that are replayed. Plans are
            made for the first.
    """

    shapes: Sequence[tuple[SearchRequest, Replay]]

    def __call__(self, plans: Sequence[Plan], stage: str) -> list[float]:
        """Return the error of each plan, the mean over shapes; infinity if it could not run.

        Args:
            plans: the plans.
            stage: name of the stage, for the progress and for the keys of the results.
        """
        elsewhere = [replace(plan, geometry=None) for plan in plans]
        by_shape = [
            _errors(request, replay, elsewhere if number else plans, stage)
            for number, (request, replay) in enumerate(self.shapes)
        ]
        return [statistics.fmean(errors) for errors in zip(*by_shape, strict=True)]


def _errors(
    request: SearchRequest, replay: Replay, plans: Sequence[Plan], stage: str
) -> list[float]:
    calls = replayed_calls(request, replay)

    def task(plan: Plan) -> Task:
        return Task(
            {"plan": plan.to_json(), "calls": calls},
            f"a plan of {len(plan.rules)} rules",
            lambda: ({"error": _finite(replay.error(plan))}, {}),
        )

    results = request.runner.do(stage, [task(plan) for plan in plans], needed=False)
    values = [None if result is None else result.value["error"] for result in results]
    return [math.inf if value is None else float(value) for value in values]


def replayed_calls(request: SearchRequest, replay: Replay) -> list[Any]:
    """Return which calls are replayed, as JSON values."""
    return [[prompt, seed] for prompt, seed in request.to_learn] + [
        [call.role, call.name, call.step] for call in replay.calls
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
