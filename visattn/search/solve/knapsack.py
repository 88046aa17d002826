"""The multiple-choice knapsack: one option for each head, least loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from visattn.geometry.layout import on_cpu

__all__ = ["Option", "best_choice", "frontier", "pareto"]

BINS = 2000  # of a budget, at least
BINS_EACH = 20  # and for each group, so that rounded costs add up to little


class Option(NamedTuple):
    """What a group may take: its cost and its loss, and which of its choices it stands for."""

    cost: float
    loss: float
    choice: tuple[int, ...]


def pareto(options: Sequence[Option]) -> list[Option]:
    """The options that no other beats in both cost and loss, by rising cost."""
    kept: list[Option] = []
    for own in sorted(options):
        if not kept or own.loss < kept[-1].loss:
            kept.append(own)
    return kept


def best_choice(groups: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The option of each group of least summed loss within a budget of summed cost, but for
    rounding: costs are counted in ``1 / max(2000, 20 groups)`` of what the budget leaves above the
    cheapest. None where not even the cheapest fit. Equal losses are decided by order.

    Raises:
        ValueError: a group is empty.
    """
    found = _solve(groups, budget)
    if found is None:
        return None
    table, steps, losses = found
    return _back(table, steps, len(losses) - 1)


def frontier(groups: Sequence[Sequence[Option]], points: int) -> list[Option]:
    """The best options of several groups together, up to the dearest, by rising cost; where there
    are more than ``points``, every second or third of them. Choices are those of the groups one
    after the other.

    Raises:
        ValueError: a group is empty.
    """
    found = _solve(groups, sum(max(own.cost for own in group) for group in groups))
    assert found is not None
    table, steps, losses = found
    falls = [0, *((losses[1:] < losses[:-1]).nonzero().flatten() + 1).tolist()]
    each = -(-len(falls) // points)
    out = []
    for place in [*falls[:-1:each], falls[-1]]:
        chosen = _back(table, steps, place)
        own = [group[n] for group, n in zip(groups, chosen, strict=True)]
        out.append(
            Option(
                sum(x.cost for x in own),
                sum(x.loss for x in own),
                tuple(n for x in own for n in x.choice),
            )
        )
    return pareto(out)


Step = list[int]  # the costs of a group's options in bins


@on_cpu
def _solve(
    groups: Sequence[Sequence[Option]], budget: float
) -> tuple[list[torch.Tensor], list[Step], torch.Tensor] | None:
    """Which option of each group gives the least loss of the groups so far, by the bins that may be
    spent; the bins of the options; and the least loss of all."""
    if not all(groups):
        raise ValueError("groups holds an empty one; each has an option at least")
    cheapest = [min(own.cost for own in group) for group in groups]
    left = budget - sum(cheapest)
    if left < -1e-12 * abs(budget):
        return None
    bins = max(BINS, BINS_EACH * len(groups))
    unit = max(left, 0.0) / bins
    best = torch.zeros(bins + 1, dtype=torch.float64)
    table, steps = [], []
    for group, least in zip(groups, cheapest, strict=True):
        step = [
            round((own.cost - least) / unit) if unit > 0 else 0 if own.cost <= least else bins + 1
            for own in group
        ]
        lines = torch.full((len(group), bins + 1), torch.inf, dtype=torch.float64)
        for number, (own, moved) in enumerate(zip(group, step, strict=True)):
            if moved <= bins:
                lines[number, moved:] = best[: bins + 1 - moved] + own.loss
        best, which = lines.min(0)
        table.append(which)
        steps.append(step)
    return table, steps, best


def _back(table: Sequence[torch.Tensor], steps: Sequence[Step], place: int) -> list[int]:
    """The options that lead to a place."""
    chosen = []
    for which, step in zip(reversed(table), reversed(steps), strict=True):
        own = int(which[place])
        chosen.append(own)
        place -= step[own]
    return chosen[::-1]
