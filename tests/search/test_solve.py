"""The knapsack against all choices, and fronts of several groups."""

import itertools
import random

import pytest

from visattn.search.solve.knapsack import Option, best_choice, frontier, pareto


def groups(seed):
    draw = random.Random(seed)
    return [
        [Option(draw.random(), draw.random(), (n,)) for n in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 5))
    ]


@pytest.mark.parametrize("seed", range(40))
def test_least_loss_within_the_budget(seed):
    """But for rounding of the costs, no choice has less loss at the same cost."""
    own = groups(seed)
    budget = random.Random(seed).random() * len(own)
    every = [
        (sum(x.cost for x in chosen), sum(x.loss for x in chosen))
        for chosen in itertools.product(*own)
    ]
    within = [loss for cost, loss in every if cost <= budget]
    found = best_choice(own, budget)
    if not within:
        assert found is None
        return
    chosen = [group[n] for group, n in zip(own, found, strict=True)]
    assert sum(x.cost for x in chosen) <= budget * (1 + 1e-3)
    slack = len(own) * budget / 2000
    tighter = [loss for cost, loss in every if cost <= budget - slack]
    assert sum(x.loss for x in chosen) <= min(tighter, default=max(within)) + 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_front_of_several_groups(seed):
    """Each point is a choice of the groups, none beats another, and the ends are the extremes."""
    own = groups(seed)
    front = frontier(own, 500)
    for point in front:
        chosen = [group[n] for group, n in zip(own, point.choice, strict=True)]
        assert sum(x.cost for x in chosen) == pytest.approx(point.cost)
        assert sum(x.loss for x in chosen) == pytest.approx(point.loss)
    assert front == pareto(front)
    assert front[0].cost == pytest.approx(sum(min(x.cost for x in group) for group in own))
    assert front[-1].loss == pytest.approx(sum(min(x.loss for x in group) for group in own))


def test_equal_costs_and_an_empty_group():
    same = [[Option(1.0, 0.5, (0,)), Option(1.0, 0.25, (1,))]] * 3
    assert best_choice(same, 3.0) == [1, 1, 1]
    assert best_choice(same, 2.9) is None
    with pytest.raises(ValueError, match="empty"):
        best_choice([[], same[0]], 1.0)
