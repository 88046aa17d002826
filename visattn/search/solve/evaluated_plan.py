"""Plans that a search has judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from visattn.patterns import HeadPattern
from visattn.plan import Plan
from visattn.search.solve.price_table import Group

__all__ = ["EvaluatedPlan"]


@dataclass(frozen=True)
class EvaluatedPlan:
    """A plan that was judged.

    Attributes:
        name: of the method or family that it comes from.
        kind: ``"searched"``, ``"uniform static"``, ``"uniform dynamic"``, ``"published rule"`` or
            ``"random"``.
        target_speedup: the speedup of a generation that it was made for; None: for none.
        plan: the plan.
        heads: its patterns.
        pattern: the pattern of all heads, if it is one.
        predicted: speedup by what its layers cost; None where they were not timed.
        error: of the model's own output.
        density: kept share of the pairs, the mean over heads; None with a dynamic pattern.
    """

    name: str
    kind: str
    target_speedup: float | None
    plan: Plan
    heads: Mapping[Group, tuple[HeadPattern, ...]] = field(repr=False)
    pattern: str | None
    predicted: float | None
    error: float
    density: float | None

    @property
    def label(self) -> str:
        """Its name and speed."""
        speed = "" if self.target_speedup is None else f", {self.target_speedup:g}x"
        return f"{self.name}{speed}"
