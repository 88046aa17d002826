"""State of dynamic patterns that lasts from one denoising step to the next."""

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

TOO_MUCH = 2.0  # a guard acts when the error exceeds the allowed error times this
QUANTILE = 0.95  # the error of a call is this quantile over its audited rows


@dataclass
class _Kept:
    """A selection that is reused at later steps.

    Attributes:
        step: the step at which it was made.
        selection: the selection.
        means: means of the keys at that step.
        error: error of the audited rows; kept on the device and read only at the next step.
    """

    step: int
    selection: Selection
    means: torch.Tensor
    error: torch.Tensor | None = None


@dataclass
class Memory:
    """What the dynamic patterns of one layer keep between denoising steps, for one pass.

    A pipeline with a plan makes one for each layer and pass. A step number that does not increase
    marks a new generation: reused selections are then dropped, raised budgets stay.

    Attributes:
        step: the current step, or None where it is not known.
        made: number of selections that were computed.
        reused: number of calls that reused an earlier selection.
        broken: whether any score was not finite, bool, or None where no score was checked.
        density: density of the last selection, by pattern.
        audited: the head patterns and audit of the last audited call, or None.
        notches: how often the budget of a pattern was raised.

    Example:
        >>> from visattn.selectors import Memory
        >>> memory = Memory()
        >>> memory.begin(step=0, steps=20)
        >>> memory.step, memory.made, memory.reused
        (0, 0, 0)
    """

    step: int | None = None
    made: int = 0
    reused: int = 0
    broken: torch.Tensor | None = None
    density: dict[Selector, torch.Tensor] = field(default_factory=dict)
    audited: tuple[tuple[HeadPattern, ...], Audit] | None = None  # heads of the last call
    notches: dict[Reuse, int] = field(default_factory=dict)
    _kept: dict[Reuse, _Kept] = field(default_factory=dict)
    _past: dict[Selector, SelectorState] = field(default_factory=dict)
    _when: tuple[int, int] = (-1, 0)

    def begin(self, step: int | None, steps: int | None) -> None:
        """Announce a call at ``step`` of ``steps``; None where they are not known."""
        last, count = self._when
        if step is None or steps is None or step <= last or steps != count:
            self._kept.clear()
            self._past.clear()
        self.step = step
        self._when = (-1, 0) if step is None or steps is None else (step, steps)

    def past(self, pattern: Selector) -> SelectorState:
        """Return the state of a pattern after its last call; a new one without a known step."""
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
        """Return the stored selection of a pattern if it is still valid, else a new one."""
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
        """Return whether the error of the last call exceeds what the guard allows."""
        if pattern.guard is None or kept.error is None:
            return False
        return not float(kept.error) <= TOO_MUCH * pattern.guard  # also true for NaN

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
            is_broken = selection.broken.any()
            self.broken = is_broken if self.broken is None else self.broken | is_broken
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
        """Store what a pattern and its guard need from a call that has run."""
        from visattn.selectors.methods.across_steps.reuse import Reuse

        if self.step is None:
            return
        if pattern.learns:
            pattern.learn(self.past(pattern), lse.detach(), highest)
        if isinstance(pattern, Reuse) and pattern.guard is not None:
            rows, step = pattern.rows, self.step
            measured = audit(q, k, v, out, lse, layout, text_lengths, scale, rows, step)
            self._kept[pattern].error = measured.error.quantile(QUANTILE, dim=-1).amax()
        if self.step == self._when[1] - 1:  # the last step: free the memory
            self._past.pop(pattern, None)
            if isinstance(pattern, Reuse):
                self._kept.pop(pattern, None)


def _means(k: torch.Tensor) -> torch.Tensor:
    """Return the means of runs of 64 keys, ``[B, Hk, ceil(L / 64), D]``."""
    pad = -k.shape[2] % 64
    padded = torch.nn.functional.pad(k.float(), (0, 0, 0, pad))
    means: torch.Tensor = padded.unflatten(2, (-1, 64)).mean(3)
    return means
