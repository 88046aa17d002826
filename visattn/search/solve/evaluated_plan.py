"""Plans that a search has tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from visattn.patterns import HeadPattern
from visattn.plan import Plan
from visattn.search.solve.price_table import Group

__all__ = ["EvaluatedPlan"]


@dataclass(frozen=True)
class EvaluatedPlan:
    """A plan that was tried.

    Attributes:
        name, kind: how it came about: ``"searched"``, ``"uniform static"``, ``"uniform dynamic"``,
            ``"published rule"``, ``"random"``, ``"oracle"``.
        target: the speed-up of a generation that it was made for; None: for none.
        plan: itself; heads: its patterns; pattern: of all heads, where it is one.
        predicted: speed-up by what its layers cost; None where they were not timed.
        error: of the model's own output.
        density: of the pairs, the mean over heads; None where a dynamic one chooses.
    """

    name: str
    kind: str
    target: float | None
    plan: Plan
    heads: Mapping[Group, tuple[HeadPattern, ...]] = field(repr=False)
    pattern: str | None
    predicted: float | None
    error: float
    density: float | None
