"""The plan that a search chooses, and the plans that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from visattn.search.claims import BEST_DYNAMIC, BEST_STATIC
from visattn.search.clip_statistics import PLANNED
from visattn.search.solve.evaluated_plan import EvaluatedPlan

__all__ = ["Comparison", "best_by_speed"]

SLOWER = 1.25  # a compared dynamic rule is at most this factor slower than the fastest one


def best_by_speed(plans: Sequence[EvaluatedPlan]) -> dict[float, EvaluatedPlan]:
    """Return the plan of least error for every speed, of any kind."""
    best: dict[float, EvaluatedPlan] = {}
    for plan in plans:
        speed = plan.target_speedup
        if speed is None or not math.isfinite(plan.error):
            continue
        if speed not in best or plan.error < best[speed].error:
            best[speed] = plan
    return dict(sorted(best.items()))


@dataclass(frozen=True)
class Comparison:
    """The chosen plan and the plans that it is compared with.

    Args:
        plans: all evaluated plans.
        front: the plan of least error for each speed.
        chosen: the chosen plan, one of the front.
    """

    plans: Sequence[EvaluatedPlan]
    front: Mapping[float, EvaluatedPlan]
    chosen: EvaluatedPlan

    @property
    def named(self) -> dict[str, EvaluatedPlan]:
        """The plans whose clips are generated, by their names among the clips."""
        speeds = sorted(self.front)
        assert self.chosen.target_speedup is not None
        index = speeds.index(self.chosen.target_speedup)
        named = {PLANNED: self.chosen}
        if self.static is not None:
            named[BEST_STATIC] = self.static
        if self.dynamic is not None:
            named[BEST_DYNAMIC] = self.dynamic
        for neighbor in (index - 1, index + 1):
            if 0 <= neighbor < len(speeds):
                speed = speeds[neighbor]
                named[f"front {speed:g}x"] = self.front[speed]
        return named

    @property
    def static(self) -> EvaluatedPlan | None:
        """The best uniform static plan at the chosen speed."""
        return self._best("uniform static")

    @property
    def dynamic(self) -> EvaluatedPlan | None:
        """The dynamic rule to compare with: the one of least error among those that reach the
        chosen speed. If there is none, it is the one of least error among the fastest rules."""
        best = self._best("uniform dynamic")
        fastest = self._fastest([x for x in self._dynamic if math.isfinite(x.error)])
        if best is not None or fastest is None:
            return best
        least = (fastest.predicted or 0.0) / SLOWER
        rules = [x for x in self._dynamic if math.isfinite(x.error) and (x.predicted or 0) >= least]
        return min(rules, key=lambda x: x.error)

    @property
    def fastest_dynamic(self) -> EvaluatedPlan | None:
        """The dynamic rule that is predicted to be the fastest."""
        return self._fastest(self._dynamic)

    def listed(self) -> list[EvaluatedPlan]:
        """Return the plans of the receipt's table, without repetition: the chosen one, all at its
        speed, the front, and each dynamic rule at its best."""
        best: dict[tuple[str, str], EvaluatedPlan] = {}
        for plan in self.plans:
            if plan.target_speedup is None and math.isfinite(plan.error):
                key = plan.kind, plan.name
                if key not in best or plan.error < best[key].error:
                    best[key] = plan
        speed = self.chosen.target_speedup
        listed = [x for x in self.plans if x.target_speedup == speed and math.isfinite(x.error)]
        listed += [x for x in self.front.values() if x.target_speedup != speed]
        listed += [x for x in best.values() if not any(y.plan == x.plan for y in listed)]
        return sorted(listed, key=lambda x: x is not self.chosen)

    @property
    def _dynamic(self) -> list[EvaluatedPlan]:
        return [x for x in self.plans if x.kind == "uniform dynamic" and x.predicted is not None]

    def _best(self, kind: str) -> EvaluatedPlan | None:
        """Return the plan of a kind with least error at the chosen speed, other than the chosen."""
        plans = [
            x
            for x in self.plans
            if x.kind == kind
            and x.target_speedup == self.chosen.target_speedup
            and x is not self.chosen
            and math.isfinite(x.error)
        ]
        return min(plans, key=lambda x: x.error, default=None)

    @staticmethod
    def _fastest(plans: Sequence[EvaluatedPlan]) -> EvaluatedPlan | None:
        return max(plans, key=lambda x: x.predicted or 0.0, default=None)
