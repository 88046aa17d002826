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

NOTCH = 1.25  # factor by which a budget of blocks is raised
MOST_NOTCHES = 16
BUDGETS = ("keep", "mass", "share", "least", "regions", "ends")  # parameters that are budgets
MASSES = ("mass", "share")  # budgets that are raised by halving what they leave out


@dataclass(frozen=True, eq=False)
class Reuse(Selector):
    """Reuse the selection of another selector for several denoising steps.

    The important blocks depend on the prompt but change little from one step to the next.

    Args:
        selector: the selector that chooses.
        every: number of steps that a selection serves, including the step at which it was made.
        at: if given, replaces ``every``: shares of all steps, increasing, at which a new selection
            is made, in addition to the first call.
        drift: also choose again if the block means of the keys have moved by more than this share
            of their norm since the selection. Reading it waits for the device. None: no such test.
        guard: allowed relative error (L1) of a row. Some rows of each head are also computed
            exactly. If the 95th percentile of their errors is above twice the guard, the next step
            chooses again with a larger budget: 1.25 times the blocks, or half of the mass that was
            left out. The budget rises at most 16 times. None: no rows are computed exactly.
        rows: number of exact rows of each head.

    A pipeline with a plan knows its steps. If the step or the pass of a call is not known (as in
    ``sparse_attention``), each call chooses again.

    Example:
        >>> import torch
        >>> from visattn import Grid, TokenLayout, sparse_attention
        >>> from visattn.selectors import VSA, Reuse
        >>> layout = TokenLayout(Grid(2, 8, 8))
        >>> q, k, v = torch.randn(3, 1, 2, layout.length, 16)
        >>> sparse_attention(q, k, v, Reuse(VSA(0.5, (2, 2, 2)), every=3), layout).shape
        torch.Size([1, 2, 128, 16])

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
                f"selector={self.selector} stores values of each call, so its choice cannot be "
                "reused in another call; use it without reuse"
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
                    f"guard={self.guard} needs a selector with a budget that can be raised, and "
                    f"{self.selector} has none; use one with {', '.join(BUDGETS)}"
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
        """Return whether a selection of step ``made`` is still valid at ``step``."""
        if self.at is None:
            return step - made < self.every
        return not any(made < share * steps <= step for share in self.at)

    def learn(self, past: SelectorState, lse: torch.Tensor, highest: torch.Tensor | None) -> None:
        self.selector.learn(past, lse, highest)

    def can_rise(self, notches: int) -> bool:
        """Return whether the budget can still be raised after ``notches`` times."""
        return notches < MOST_NOTCHES and self.raised(notches + 1) != self.raised(notches)

    def raised(self, notches: int) -> Selector:
        """Return the selector with its budget raised ``notches`` times."""
        return raised(self.selector, notches) if notches else self.selector


def raised(selector: Selector, notches: int) -> Selector:
    """Return a selector with its budgets raised ``notches`` times; itself if it has no budget."""
    changes = {}
    for field in fields(selector):  # type: ignore[arg-type]
        value = getattr(selector, field.name)
        if field.name not in BUDGETS or value is None:
            continue
        if field.name in MASSES:
            changes[field.name] = 1 - (1 - value) / 2**notches
        elif isinstance(value, tuple):
            changes[field.name] = tuple(min(1.0, end * NOTCH**notches) for end in value)
        elif isinstance(value, int):
            changes[field.name] = max(value + notches, math.ceil(value * NOTCH**notches))
        else:
            changes[field.name] = min(1.0, value * NOTCH**notches)
    return replace(selector, **changes) if changes else selector  # type: ignore[type-var]
