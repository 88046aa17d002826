"""What dynamic patterns remember of earlier steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from visattn.geometry.layout import TokenLayout
from visattn.selectors.audit import Audit, audit
from visattn.selectors.stages.history import SelectorState
from visattn.selectors.stages.selection import Selection

if TYPE_CHECKING:
    from visattn.patterns import HeadPattern
    from visattn.selectors.methods.across_steps.reuse import Reuse
    from visattn.selectors.selector import Selector

__all__ = ["Memory"]

TOO_MUCH = 2.0  # times the error that was allowed, at which a guard acts
QUANTILE = 0.95  # of the audited rows


@dataclass
class _Kept:
    """A choice that serves several steps: when it was made, the block means of the keys then, and
    the error of its audited rows, which is read when the next step asks."""

    step: int
    selection: Selection
    means: torch.Tensor
    error: torch.Tensor | None = None


@dataclass
class Memory:
    """The choices of a layer in one pass, by pattern. A step that does not come after the last one
    begins a new generation, which starts anew; raised budgets stay."""

    step: int | None = None
    made: int = 0
    reused: int = 0
    broken: torch.Tensor | None = None  # whether scores were ever not finite
    density: dict[Selector, torch.Tensor] = field(default_factory=dict)  # executed, last chosen
    audited: tuple[tuple[HeadPattern, ...], Audit] | None = None  # heads of the last call
    notches: dict[Reuse, int] = field(default_factory=dict)  # how often a budget was raised
    _kept: dict[Reuse, _Kept] = field(default_factory=dict)
    _past: dict[Selector, SelectorState] = field(default_factory=dict)
    _when: tuple[int, int] = (-1, 0)

    def begin(self, step: int | None, steps: int | None) -> None:
        """A call at a step; None where it is not known."""
        last, count = self._when
        if step is None or steps is None or step <= last or steps != count:
            self._kept.clear()
            self._past.clear()
        self.step = step
        self._when = (-1, 0) if step is None or steps is None else (step, steps)

    def past(self, pattern: Selector) -> SelectorState:
        """What a pattern knows of its last call; empty where steps are not known."""
        if self.step is None:
            return SelectorState()
        return self._past.setdefault(pattern, SelectorState())

    def choose(
        self,
        pattern: Selector,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        *,
        kernels: bool = False,
    ) -> Selection:
        """The selection of a pattern: one that is kept where it serves, else a new one."""
        from visattn.selectors.methods.across_steps.reuse import Reuse

        if not isinstance(pattern, Reuse) or self.step is None:
            return self._new(pattern, pattern, q, k, v, layout, scale, kernels)
        kept = self._kept.get(pattern)
        notches = self.notches.get(pattern, 0)
        if kept is not None and self._too_far_off(pattern, kept) and pattern.can_rise(notches):
            self.notches[pattern] = notches + 1
            kept = None
        if kept is not None and pattern.serves(kept.step, self.step, self._when[1]):
            means = _means(k) if pattern.drift is not None else kept.means
            moved = (means - kept.means).norm() / kept.means.norm().clamp(min=1e-30)
            if pattern.drift is None or float(moved) <= pattern.drift:
                self.reused += 1
                return kept.selection
        chooser = pattern.raised(self.notches.get(pattern, 0))
        selection = self._new(pattern, chooser, q, k, v, layout, scale, kernels)
        means = _means(k) if pattern.drift is not None else k.new_zeros(())
        self._kept[pattern] = _Kept(self.step, selection, means)
        return selection

    def _too_far_off(self, pattern: Reuse, kept: _Kept) -> bool:
        """Whether the audited rows of the last call were further off than the guard allows."""
        if pattern.guard is None or kept.error is None:
            return False
        return not float(kept.error) <= TOO_MUCH * pattern.guard  # NaN too

    def _new(
        self,
        pattern: Selector,
        chooser: Selector,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: TokenLayout,
        scale: float,
        kernels: bool,
    ) -> Selection:
        past = self.past(pattern)
        selection = chooser.select(q, k, v, layout, scale, kernels=kernels, past=past)
        self.made += 1
        self.density[pattern] = selection.block_density().mean()
        if selection.broken is not None:
            own = selection.broken.any()
            self.broken = own if self.broken is None else self.broken | own
        return selection

    def learn(
        self,
        pattern: Selector,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: TokenLayout,
        text_lengths: torch.Tensor | None,
        scale: float,
        highest: torch.Tensor | None,
    ) -> None:
        """After a call: what the pattern and its guard are to know of it."""
        from visattn.selectors.methods.across_steps.reuse import Reuse

        if self.step is None:
            return
        if pattern.learns:
            pattern.learn(self.past(pattern), lse.detach(), highest)
        if isinstance(pattern, Reuse) and pattern.guard is not None:
            rows, step = pattern.rows, self.step
            found = audit(q, k, v, out, lse, layout, text_lengths, scale, rows, step)
            self._kept[pattern].error = found.error.quantile(QUANTILE, dim=-1).amax()
        if self.step == self._when[1] - 1:  # the last one
            self._past.pop(pattern, None)
            if isinstance(pattern, Reuse):
                self._kept.pop(pattern, None)


def _means(k: torch.Tensor) -> torch.Tensor:
    """Means of runs of 64 keys, ``[B, Hk, ceil(L / 64), D]``."""
    pad = -k.shape[2] % 64
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, pad))
    means: torch.Tensor = padded.unflatten(2, (-1, 64)).mean(3)
    return means
