"""The select stage against sorting: every prefix, with ties, weights, infinities and scopes."""

from __future__ import annotations

import math

import pytest
import torch

from visattn.selectors.stages.choose import Levels, Threshold, TokenBudget, TopK, TopP
from visattn.selectors.stages.prefix import (
    count_of,
    levels_by,
    mass_weights,
    order_keys,
    smallest_prefix,
    top_count,
    top_mass,
)


def ranked(scores: list[float]) -> list[int]:
    """Indices by score descending, then index ascending; what is minus infinity left out."""
    free = [n for n, score in enumerate(scores) if score != -float("inf")]
    return sorted(free, key=lambda n: (-scores[n], n))


def prefix(scores: list[float], weights: list[int], target: int) -> set[int]:
    out: set[int] = set()
    total = 0
    for n in ranked(scores):
        if total >= target:
            break
        out.add(n)
        total += weights[n]
    return out


def draws(kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 5, 17)
    if kind == "ties":
        x = torch.randint(-2, 3, shape, generator=generator).float()
    elif kind == "equal":
        x = torch.zeros(shape)
    else:
        x = torch.randn(shape, generator=generator) * 3
        x[..., ::4] = 0.0
        x[..., 1::4] = -0.0
        x[0, 0, 0, :3] = torch.tensor([float("inf"), 1e-38, -1e-38])
    gone = torch.rand(shape, generator=generator) < (0.3 if kind != "equal" else 0)
    x[gone] = -torch.inf
    x[1, 1, 1] = -torch.inf
    return x


def chosen(mask: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in mask.flatten(0, -2)]


@pytest.mark.parametrize("kind", ["ties", "equal", "numbers"])
@pytest.mark.parametrize("seed", range(3))
def test_smallest_prefix_is_that_of_a_sort(kind: str, seed: int) -> None:
    scores = draws(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 5, scores.shape, generator=generator)
    for target in (-1, 0, 1, 2, 7, 20, 1000):
        mask = smallest_prefix(order_keys(scores), weights, torch.tensor(target))
        rows = zip(scores.flatten(0, 2).tolist(), weights.flatten(0, 2).tolist(), strict=True)
        # weights of 0 at the end of a prefix that cannot reach its target count for nothing
        for own, (row, weight) in zip(chosen(mask), rows, strict=True):
            reach = sum(weight[n] for n in ranked(row))
            assert own == prefix(row, weight, min(target, reach))


@pytest.mark.parametrize("kind", ["ties", "equal", "numbers"])
def test_top_count(kind: str) -> None:
    scores = draws(kind, 5)
    for count in (0, 1, 4, 17, 99):
        rows = scores.flatten(0, 2).tolist()
        expected = [set(ranked(row)[:count]) for row in rows]
        assert chosen(top_count(scores, count)) == expected
    each = torch.arange(30).view(2, 3, 5, 1) % 7
    own = [set(ranked(r)[: int(n)]) for r, n in zip(scores.flatten(0, 2).tolist(), each.flatten(),
                                                    strict=True)]
    assert chosen(top_count(scores, each)) == own


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_top_mass_holds_the_share_and_no_more(share: float) -> None:
    scores = draws("numbers", 1).nan_to_num(posinf=9.0, neginf=-float("inf"))
    probability = scores.double().softmax(-1)
    kept = top_mass(scores, share)
    for row, own in zip(probability.flatten(0, 2), kept.flatten(0, 2), strict=True):
        if row.isnan().any():
            assert not own.any()
            continue
        held = float(row[own].sum())
        assert held >= share - 1e-4
        if own.any():
            assert held - float(row[own].min()) < share + 1e-4


def test_weights_are_integers_of_the_best() -> None:
    weights = mass_weights(torch.tensor([[3.0, -torch.inf, -9.0], [-torch.inf] * 3]))
    assert weights[0].tolist()[:2] == [1 << 24, 0] and weights[1].tolist() == [0, 0, 0]
    scores = torch.linspace(-28, 0, 5000)[None]
    found = mass_weights(scores)[0].double() / (1 << 24)
    exact = scores[0].double().exp()
    assert float(((found - exact).abs() - 4e-5 * exact).max()) < 2**-24
    assert bool((found.diff() >= 0).all())


def test_counts() -> None:
    assert count_of(3, 10) == 3
    assert [count_of(0.25, n) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert count_of(0.5, torch.tensor([0, 3])).tolist() == [1, 2]
    assert count_of(1.0, 7) == 7


def test_levels_take_the_first_mask_that_holds() -> None:
    masks = [torch.tensor(x, dtype=torch.bool) for x in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])]
    assert levels_by(masks, (1, 4, 255)).tolist() == [1, 4, 255, 0]


# ---- ways to choose

LENGTH = torch.tensor([[[4, 4, 3, 4, 4, 1, 4, 4, 2, 4, 4, 4, 3, 4, 4, 4, 4]]])
FORCED = torch.zeros(1, 1, 5, 17, dtype=torch.bool)
FORCED[..., 2] = True
FORCED[0, 0, 3, 9:12] = True


def test_top_k_of_rows_counts_what_is_forced() -> None:
    scores = draws("ties", 2)
    levels = TopK(4)(scores, LENGTH, FORCED)
    forced = FORCED.expand_as(scores).flatten(0, 2)
    for row, own, levels_of in zip(
        scores.flatten(0, 2).tolist(), forced, levels.flatten(0, 2), strict=True
    ):
        must = set(own.nonzero()[:, 0].tolist())
        free = [n for n in ranked(row) if n not in must]
        inside = len([n for n in must if row[n] != -float("inf")])
        expected = must | set(free[: max(0, 4 - inside)])
        assert set(levels_of.nonzero()[:, 0].tolist()) == expected
    on_top = TopK(4, inside=False)(scores, LENGTH, FORCED)
    assert torch.equal(on_top.bool(), top_count(scores, 4) | FORCED)


def test_top_k_of_heads_lets_rows_compete() -> None:
    scores = draws("numbers", 3)
    none = torch.zeros_like(FORCED)
    levels = TopK(0.2, scope="head")(scores, LENGTH, none)
    for own, kept in zip(scores.flatten(0, 1), levels.flatten(0, 1), strict=True):
        flat = own.flatten().tolist()
        free = len(ranked(flat))
        expected = set(ranked(flat)[: math.ceil(free / 5)])
        assert set(kept.flatten().nonzero()[:, 0].tolist()) == expected


def test_a_number_for_a_head_counts_the_rows_that_choose() -> None:
    scores = draws("numbers", 9)
    scores[:, :, 3] = -torch.inf
    kept = TopK(2, scope="head")(scores, LENGTH, torch.zeros_like(FORCED))
    rows = (scores > -torch.inf).any(-1).sum(-1)
    assert torch.equal(kept.long().sum((-1, -2)), 2 * rows)


def test_top_p_bounds_and_forced() -> None:
    scores = draws("numbers", 4).nan_to_num(posinf=9.0, neginf=-float("inf"))
    none = torch.zeros_like(FORCED)
    few = TopP(0.01, least=3)(scores, LENGTH, none).bool()
    assert torch.equal(few, top_mass(scores, 0.01) | top_count(scores, 3))
    many = TopP(1.0, most=0.5)(scores, LENGTH, none).bool()
    assert bool((many.sum(-1) <= 9).all())
    first = TopP(0.5, counted=True)(scores, LENGTH, FORCED).bool()
    later = TopP(0.5)(scores, LENGTH, FORCED).bool()
    assert bool((first | ~FORCED)[FORCED.expand_as(first)].all())
    assert int(first.sum()) <= int(later.sum())


@pytest.mark.parametrize("kind", ["ties", "equal", "numbers"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.75, 1.0])
def test_a_share_that_is_not_crossed(kind: str, share: float) -> None:
    scores = draws(kind, 9).nan_to_num(posinf=9.0, neginf=-float("inf"))
    kept = chosen(top_mass(scores, share, crossing=False))
    weights = mass_weights(scores).flatten(0, -2).tolist()
    for row, own, found in zip(scores.flatten(0, -2).tolist(), weights, kept, strict=True):
        expected, held = set(), 0
        for n in ranked(row):
            held += own[n]
            if held > share * sum(own):
                break
            expected.add(n)
        assert {n for n in found if own[n]} == {n for n in expected if own[n]}
    levels = TopP(share, crossing=False)(scores, LENGTH, torch.zeros_like(FORCED)).bool()
    assert torch.equal(levels.any(-1), (scores > -torch.inf).any(-1))  # the best one at least


def test_token_budget_counts_tokens() -> None:
    scores = draws("numbers", 6)
    none = torch.zeros_like(FORCED)
    kept = TokenBudget(0.4)(scores, LENGTH, none).bool().flatten(0, 2)
    for row, own in zip(scores.flatten(0, 2).tolist(), kept, strict=True):
        weights = LENGTH[0, 0].tolist()
        total = sum(weights[n] for n in ranked(row))
        expected = prefix(row, weights, math.ceil(total * 0.4 - 1e-9))
        assert set(own.nonzero()[:, 0].tolist()) == expected


def test_threshold_keeps_the_best_in_any_case() -> None:
    scores = draws("numbers", 7).nan_to_num(posinf=9.0, neginf=-float("inf"))
    kept = Threshold(0.99)(scores, LENGTH, torch.zeros_like(FORCED)).bool()
    rows = (scores > -torch.inf).any(-1)
    assert bool((kept.sum(-1)[rows] == 1).all()) and not kept[~rows].any()


def test_levels_by_mass_and_by_count() -> None:
    scores = draws("numbers", 8).nan_to_num(posinf=9.0, neginf=-float("inf"))
    none = torch.zeros_like(FORCED)
    for by in ("mass", "count"):
        levels = Levels((0.2, 0.4, 0.4, 0.9), by=by)(scores, LENGTH, none)  # type: ignore[arg-type]
        rows = zip(scores.flatten(0, 2).tolist(), levels.flatten(0, 2).tolist(), strict=True)
        for row, own in rows:
            order = ranked(row)
            given = [own[n] for n in order]
            steps = [{1: 0, 2: 1, 4: 2, 8: 3, 0: 4}[level] for level in given]
            assert steps == sorted(steps) and 4 not in given  # the third level ends where it begins
            assert all(own[n] == 0 for n in range(17) if n not in order)
            if by == "count" and order:
                count = len(order)
                ends = [math.ceil(count * end - 1e-9) for end in (0.2, 0.4)]
                assert [given.count(x) for x in (1, 2)] == [ends[0], max(0, ends[1] - ends[0])]
