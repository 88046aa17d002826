"""Choices that serve several denoising steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Grid, TokenLayout, check_count
from visattn.selectors.selection import Selection
from visattn.selectors.selector import Selector, check_share

__all__ = ["Memory", "Reuse"]


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

    A pipeline with a plan knows its steps; where the step or the pass of a call is not known (as in
    ``sparse_attention``), each call chooses.
    """

    selector: Selector
    every: int = 4
    at: tuple[float, ...] | None = None
    drift: float | None = None
    name: ClassVar[str] = "reuse"

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector) or isinstance(self.selector, Reuse):
            raise TypeError(f"selector={self.selector!r} must be a dynamic pattern such as jenga()")
        if not self.selector.keeps:
            raise ValueError(
                f"selector={self.selector} corrects its output by values of the call, which do not "
                "serve another one; use it without reuse"
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

    def check(self, grid: Grid) -> None:
        self.selector.check(grid)

    def select(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, scale: float
    ) -> Selection:
        return self.selector.select(q, k, v, layout, scale)

    def serves(self, made: int, step: int, steps: int) -> bool:
        """Whether a choice of step ``made`` still serves at a later one."""
        if self.at is None:
            return step - made < self.every
        return not any(made < share * steps <= step for share in self.at)


@dataclass
class _Kept:
    step: int
    selection: Selection
    means: torch.Tensor


class Memory:
    """The choices of a layer in one pass, by pattern. A step that does not come after the last one
    begins a new generation, which starts anew."""

    def __init__(self) -> None:
        self._kept: dict[Reuse, _Kept] = {}
        self._when: tuple[int, int] = (-1, 0)
        self.step: int | None = None
        self.made = self.reused = 0
        self.broken: torch.Tensor | None = None  # whether scores were ever not finite
        self.density: dict[Selector, torch.Tensor] = {}  # executed share of each, when last chosen

    def begin(self, step: int | None, steps: int | None) -> None:
        """A call at a step; None where it is not known."""
        last, count = self._when
        if step is None or steps is None or step <= last or steps != count:
            self._kept.clear()
        self.step = step
        self._when = (-1, 0) if step is None or steps is None else (step, steps)

    def choose(
        self,
        pattern: Selector,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
    ) -> Selection:
        """The selection of a pattern: one that is kept where it serves, else a new one."""
        if not isinstance(pattern, Reuse) or self.step is None:
            return self._new(pattern, q, k, v, layout, scale)
        kept = self._kept.get(pattern)
        if kept is not None and pattern.serves(kept.step, self.step, self._when[1]):
            means = _means(k) if pattern.drift is not None else kept.means
            moved = (means - kept.means).norm() / kept.means.norm().clamp(min=1e-30)
            if pattern.drift is None or float(moved) <= pattern.drift:
                self.reused += 1
                return kept.selection
        selection = self._new(pattern, q, k, v, layout, scale)
        means = _means(k) if pattern.drift is not None else k.new_zeros(())
        self._kept[pattern] = _Kept(self.step, selection, means)
        return selection

    def _new(
        self,
        pattern: Selector,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
    ) -> Selection:
        selection = pattern.select(q, k, v, layout, scale)
        self.made += 1
        self.density[pattern] = selection.block_density().mean()
        if selection.broken is not None:
            own = selection.broken
            self.broken = own if self.broken is None else self.broken | own
        return selection


def _means(k: torch.Tensor) -> torch.Tensor:
    """Means of runs of 64 keys, ``[B, Hk, ceil(L / 64), D]``."""
    pad = -k.shape[2] % 64
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, pad))
    means: torch.Tensor = padded.unflatten(2, (-1, 64)).mean(3)
    return means
