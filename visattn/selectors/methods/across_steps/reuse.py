"""Choices that serve several denoising steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from visattn._arguments import check_block, check_count, check_share
from visattn.geometry.layout import Grid, TokenLayout
from visattn.selectors.selector import Selector
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.selection import Selection

__all__ = ["Reuse", "raised"]

NOTCH = 1.25  # a budget of blocks is raised by
MOST_NOTCHES = 16
BUDGETS = ("keep", "mass", "share", "least", "regions", "ends")  # parameters that are budgets
MASSES = ("mass", "share")  # of which what is left out is halved


@dataclass(frozen=True, eq=False)
class Reuse(Selector):
    """A selector whose choice is kept between denoising steps: where blocks lie moves with the
    prompt and hardly from one step to the next.

    Args:
        selector: what chooses.
        every: a choice serves so many steps, counted from the one at which it was made.
        at: instead, choices are made anew at these shares of all steps, increasing, and at the
            first call.
        drift: and wherever the block means of the keys have moved by more than this share of their
            norm since; reading it waits for the device. None: they may move.
        guard: the relative error (L1) of a row that is all right. Some rows of each head are
            computed exactly beside; when their 95th percentile is above twice the guard, the next
            step chooses anew with a budget one notch higher (blocks times 1.25; of a mass half of
            what was left out), up to 16 notches. None: no rows are.
        rows: how many of each head.

    A pipeline with a plan knows its steps; where the step or the pass of a call is not known (as in
    ``sparse_attention``), each call chooses.

    Source:
        This project; several methods keep their choices for some steps.
    Default:
        own
    Differences:
        none
    """

    selector: Selector
    every: int = 4
    at: tuple[float, ...] | None = None
    drift: float | None = None
    guard: float | None = None
    rows: int = 64
    name: ClassVar[str] = "reuse"
    color: ClassVar[str] = "#8fd9c1"
    example: ClassVar[str] = "reuse(vsa(0.3, (2, 2, 2)), 3)"

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector) or isinstance(self.selector, Reuse):
            raise TypeError(f"selector={self.selector!r} must be a dynamic pattern such as jenga()")
        if not self.selector.reusable:
            raise ValueError(
                f"selector={self.selector} corrects its output by values of the call, or learns "
                "from each, which does not serve another one; use it without reuse"
            )
        check_count("every", self.every, 1)
        if self.at is not None:
            if not isinstance(self.at, tuple):
                raise TypeError(f"at={self.at!r} must be a tuple of shares of the steps, or None")
            for share in self.at:
                check_share("at", share)
            if list(self.at) != sorted(set(self.at)):
                raise ValueError(f"at={self.at} must be increasing")
        if self.drift is not None:
            check_share("drift", self.drift, above=True)
        if self.guard is not None:
            check_share("guard", self.guard, above=True)
            if raised(self.selector, 1) == self.selector:
                raise ValueError(
                    f"guard={self.guard} cannot raise a budget of {self.selector}, which has none "
                    f"or all of it; use a selector with one of {', '.join(BUDGETS)}"
                )
        check_block("rows", self.rows)

    def check(self, grid: Grid) -> None:
        self.selector.check(grid)

    @property
    def learns(self) -> bool:
        return self.selector.learns

    def select(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
        past: SelectorState | None = None,
    ) -> Selection:
        return self.selector.select(q, k, v, layout, scale, kernels=kernels, past=past)

    def serves(self, made: int, step: int, steps: int) -> bool:
        """Whether a choice of step ``made`` still serves at a later one."""
        if self.at is None:
            return step - made < self.every
        return not any(made < share * steps <= step for share in self.at)

    def learn(self, past: SelectorState, lse: torch.Tensor, highest: torch.Tensor | None) -> None:
        self.selector.learn(past, lse, highest)

    def can_rise(self, notches: int) -> bool:
        """Whether there is another notch above so many."""
        return notches < MOST_NOTCHES and self.raised(notches + 1) != self.raised(notches)

    def raised(self, notches: int) -> Selector:
        """What chooses when the budget was raised so many times."""
        return raised(self.selector, notches) if notches else self.selector


def raised(selector: Selector, notches: int) -> Selector:
    """A selector whose budgets are so many notches higher; itself where it has none."""
    changes = {}
    for own in fields(selector):  # type: ignore[arg-type]
        value = getattr(selector, own.name)
        if own.name not in BUDGETS or value is None:
            continue
        if own.name in MASSES:
            changes[own.name] = 1 - (1 - value) / 2**notches
        elif isinstance(value, tuple):
            changes[own.name] = tuple(min(1.0, end * NOTCH**notches) for end in value)
        elif isinstance(value, int):
            changes[own.name] = max(value + notches, math.ceil(value * NOTCH**notches))
        else:
            changes[own.name] = min(1.0, value * NOTCH**notches)
    return replace(selector, **changes) if changes else selector  # type: ignore[type-var]
