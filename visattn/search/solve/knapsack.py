"""The multiple-choice knapsack: one option for each group, least total loss within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from visattn.geometry.layout import on_cpu

__all__ = ["Option", "best_choice", "frontier", "pareto"]

BINS = 2000  # least number of bins of a budget
BINS_EACH = 20  # bins for each group, so that the rounding errors of many groups stay small


class Option(NamedTuple):
    """An option of a group.

    Attributes:
        cost: in seconds.
        loss: its loss.
        choice: numbers of the candidates that it consists of.
    """

    cost: float
    loss: float
    choice: tuple[int, ...]


def pareto(options: Sequence[Option]) -> list[Option]:
    """Return the options that no other beats in both cost and loss, in ascending order of cost."""
    kept: list[Option] = []
    for option in sorted(options):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def best_choice(groups: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """Return one option of each group: those of least total loss whose total cost is in a budget.

    Costs are rounded to bins. The number of bins is ``max(2000, 20 groups)``; together they are
    what remains of the budget after the cheapest options. If losses are equal, the first option is
    taken.

    Args:
        groups: the options of each group.
        budget: largest total cost.

    Returns:
        The index of an option for each group, or None if the cheapest options exceed the budget.

    Raises:
        ValueError: a group is empty.
    """
    solved = _solve(groups, budget)
    if solved is None:
        return None
    table, steps, losses = solved
    return _chosen(table, steps, len(losses) - 1)


def frontier(groups: Sequence[Sequence[Option]], points: int) -> list[Option]:
    """Return the best combinations of the options of several groups, in ascending order of cost.

    Args:
        groups: the options of each group.
        points: about the largest number of combinations. If there are more, every n-th is returned.

    Returns:
        Combinations as options; the choice of each is that of its groups in order.

    Raises:
        ValueError: a group is empty.
    """
    solved = _solve(groups, sum(max(option.cost for option in group) for group in groups))
    assert solved is not None
    table, steps, losses = solved
    # the numbers of bins at which the least loss becomes smaller
    falls = [0, *((losses[1:] < losses[:-1]).nonzero().flatten() + 1).tolist()]
    every = -(-len(falls) // points)
    combinations = []
    for bins in [*falls[:-1:every], falls[-1]]:
        chosen = _chosen(table, steps, bins)
        options = [group[n] for group, n in zip(groups, chosen, strict=True)]
        combinations.append(
            Option(
                sum(x.cost for x in options),
                sum(x.loss for x in options),
                tuple(n for x in options for n in x.choice),
            )
        )
    return pareto(combinations)


Step = list[int]  # the costs of a group's options in bins


@on_cpu
def _solve(
    groups: Sequence[Sequence[Option]], budget: float
) -> tuple[list[torch.Tensor], list[Step], torch.Tensor] | None:
    """Solve the knapsack for all budgets up to one, or return None if no choice fits.

    Returns:
        For each group the index of the best option by the number of bins that this group and the
        groups before it can spend; the bins of the options of each group; and the least total loss
        by the number of bins.
    """
    if not all(groups):
        raise ValueError("groups holds an empty group; each group must have an option")
    cheapest = [min(option.cost for option in group) for group in groups]
    left = budget - sum(cheapest)
    if left < -1e-12 * abs(budget):
        return None
    bins = max(BINS, BINS_EACH * len(groups))
    unit = max(left, 0.0) / bins
    best = torch.zeros(bins + 1, dtype=torch.float64)
    table, steps = [], []
    for group, least in zip(groups, cheapest, strict=True):
        step = [_bins_of(option.cost, least, unit, bins) for option in group]
        sums = torch.full((len(group), bins + 1), torch.inf, dtype=torch.float64)
        for number, (option, spent) in enumerate(zip(group, step, strict=True)):
            if spent <= bins:
                sums[number, spent:] = best[: bins + 1 - spent] + option.loss
        best, which = sums.min(0)
        table.append(which)
        steps.append(step)
    return table, steps, best


def _bins_of(cost: float, least: float, unit: float, bins: int) -> int:
    """Return how many bins of the size ``unit`` a cost takes above the least cost of its group.

    If the bins have no size, a cost above the least one takes more than ``bins``.
    """
    if unit > 0:
        return round((cost - least) / unit)
    return 0 if cost <= least else bins + 1


def _chosen(table: Sequence[torch.Tensor], steps: Sequence[Step], bins: int) -> list[int]:
    """Return the index of the option of each group in the best choice for a number of bins."""
    chosen = []
    for which, step in zip(reversed(table), reversed(steps), strict=True):
        index = int(which[bins])
        chosen.append(index)
        bins -= step[index]
    return chosen[::-1]
