"""Plans with the error that a search has measured for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from visattn.patterns import HeadPattern
from visattn.plan import Plan
from visattn.search.solve.price_table import Group

__all__ = ["EvaluatedPlan"]


@dataclass(frozen=True)
class EvaluatedPlan:
    """A plan with its error and its predicted speed.

    Attributes:
        name: name of the method or family that it comes from.
        kind: ``"searched"``, ``"uniform static"``, ``"uniform dynamic"``, ``"published rule"`` or
            ``"random"``.
        target_speedup: the speedup of a generation that it was made for, or None.
        plan: the plan.
        heads: the patterns of all heads.
        pattern: written form of the pattern if all heads have the same one, or None.
        predicted: speedup predicted from the seconds of its layers, or None if a pattern was not
            timed.
        error: relative error of the model output.
        density: share of the pairs that is kept, the mean over heads; None if a pattern is dynamic.
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
        """The name and the target speedup."""
        speed = "" if self.target_speedup is None else f", {self.target_speedup:g}x"
        return f"{self.name}{speed}"
