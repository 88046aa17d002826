"""Patterns with an order of their own for each head, each against its own slow form: sorted keys,
clusters, hashes, and the choice of a static pattern."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.selectors_oracle import (
    LAYOUTS,
    SCALE,
    Output,
    check_output,
    combined,
    count,
    cut,
    descending,
    heads_of,
    mean,
    softmax,
    until,
    whole,
)

from visattn import TokenLayout
from visattn.attention.backends.reference import map_mask
from visattn.geometry.orders import LineOrder
from visattn.patterns import MultiDiagonal, Neighborhood, Stripe, Union
from visattn.selectors import (
    ClusterBlocks,
    Hashing,
    KeyOrder,
    OnlineChoice,
    Selector,
)
from visattn.selectors.attend.rest import sample_tokens
from visattn.selectors.stages.selection import SampledRest


def by_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    seen: Callable[[torch.Tensor, torch.Tensor, list[int]], dict[int, set[int]]],
    rest: SampledRest | None = None,
) -> torch.Tensor:
    """``seen(q, k, grid tokens)`` gives the grid keys that each grid query sees."""
    begin, grid = layout.grids[0]
    own = list(range(begin, begin + grid.numel))
    others = [t for t in range(layout.length) if t not in own]
    drawn = set() if rest is None else set(sample_tokens(rest, layout).tolist())
    out = torch.zeros_like(q)
    for b, h, own_q, own_k, own_v in heads_of(q, k, v):
        valid = whole(layout, q, b)
        keys = seen(own_q, own_k, own)
        for token in range(layout.length):
            visible = keys.get(token, set(own)) | {t for t in others if valid[t]}
            parts = [(own_q[token] @ own_k[t] * SCALE, own_v[t]) for t in sorted(visible)]
            missing = [t for t in own if t not in visible]
            stand = [t for t in missing if t in drawn]
            for t in stand:
                weight = math.log(len(missing) / len(stand))
                parts.append((own_q[token] @ own_k[t] * SCALE + weight, own_v[t]))
            out[b, h, token] = combined(own_q[token], parts)
    return out


def key_order(p: KeyOrder) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        blocks, kinds = cut(layout, p.order, p.block)

        def seen(own_q, own_k, own):  # type: ignore[no-untyped-def]
            rows = [own[n * len(own) // p.queries] for n in range(p.queries)]
            mass = dict.fromkeys(own, 0.0)
            for row in rows:
                weights = softmax({t: float(own_q[row] @ own_k[t]) * SCALE for t in own})
                for t in own:
                    mass[t] += weights[t]
            order = descending({t: round(x, 12) for t, x in mass.items()})
            runs = [order[n : n + p.block] for n in range(0, len(order), p.block)]
            out = {}
            for i, q_block in enumerate(blocks):
                if kinds[i]:
                    scores = {
                        j: float(mean(own_q, q_block) @ mean(own_k, run_)) * SCALE
                        for j, run_ in enumerate(runs)
                    }
                    kept = until(softmax(scores), p.mass)
                    for token in q_block:
                        out[token] = {t for j in kept for t in runs[j]}
            return out

        return by_keys(q, k, v, layout, seen)

    return run


def lloyd(points: torch.Tensor, clusters: int, iterations: int) -> list[int]:
    centres = [points[n * len(points) // clusters] for n in range(clusters)]
    owner: list[int] = []
    for turn in range(iterations):
        if turn:
            for c in range(clusters):
                mine = [n for n, own in enumerate(owner) if own == c]
                if mine:
                    centres[c] = points[mine].mean(0)
        distances = torch.stack([((points - centre) ** 2).sum(1) for centre in centres], 1)
        owner = distances.argmin(1).tolist()
    return owner


def cluster_blocks(p: ClusterBlocks) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        def seen(own_q, own_k, own):  # type: ignore[no-untyped-def]
            points_q, points_k = own_q[own], own_k[own]
            if p.metric == "interaction":
                roots = []
                for other in (points_k, points_q):
                    values, vectors = torch.linalg.eigh(other.T @ other / len(other))
                    roots.append(vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T)
                seen_q, seen_k = points_q @ roots[0], points_k @ roots[1]
            else:
                seen_q, seen_k = points_q, points_k
            owner_q = lloyd(seen_q, min(p.q_clusters, len(own)), p.iterations)
            owner_k = lloyd(seen_k, min(p.k_clusters, len(own)), p.iterations)
            groups_q = {c: [n for n, x in enumerate(owner_q) if x == c] for c in set(owner_q)}
            groups_k = {c: [n for n, x in enumerate(owner_k) if x == c] for c in set(owner_k)}
            out = {}
            for mine in groups_q.values():
                scores = {
                    c: float(points_q[mine].mean(0) @ points_k[group].mean(0)) * SCALE
                    + math.log(len(group))
                    for c, group in groups_k.items()
                }
                kept = until(softmax(scores), p.mass)
                kept |= set(descending(scores)[: count(p.least, min(p.k_clusters, len(own)), True)])
                keys = {own[n] for c in kept for n in groups_k[c]}
                out |= {own[n]: keys for n in mine}
            return out

        return by_keys(q, k, v, layout, seen)

    return run


def hashing(p: Hashing) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(p.seed)
        planes = torch.randn(q.shape[3], p.projections, generator=generator).double()
        gray = [n ^ (n >> 1) for n in range(1 << p.projections)]

        def place(x: torch.Tensor) -> int:
            signs = ((x @ planes) > 0).tolist()
            return gray.index(sum(1 << n for n, sign in enumerate(signs) if sign))

        def seen(own_q, own_k, own):  # type: ignore[no-untyped-def]
            q_order = sorted(own, key=lambda t: (place(own_q[t]), t))
            k_order = sorted(own, key=lambda t: (place(own_k[t]), t))
            out = {}
            for n in range(0, len(own), p.block):
                keys = set(k_order[n : n + p.block])
                out |= dict.fromkeys(q_order[n:n + p.block], keys)
            return out

        return by_keys(q, k, v, layout, seen, SampledRest(p.samples, p.seed))

    return run


def online_choice(p: OnlineChoice) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        begin, grid = layout.grids[0]
        every = torch.arange(layout.length)
        rows = [begin + n * grid.numel // min(p.rows, grid.numel) for n in range(
            min(p.rows, grid.numel))]

        def mask_of(pattern):  # type: ignore[no-untyped-def]
            """What the pattern visits in runs of its own order, or of raster order."""
            orders = pattern.orders(grid, p.block, p.block)
            if any(not isinstance(order, LineOrder) for order in orders):
                orders = LineOrder(), LineOrder()
            return map_mask(
                pattern.lower(layout, p.block, p.block, partial="promote", order=orders)
            )

        def seen(own_q, own_k, own):  # type: ignore[no-untyped-def]
            errors = []
            logits = own_q[rows] @ own_k.T * SCALE
            values = state["v"][state["at"]]
            state["at"] += 1
            full = logits.softmax(1) @ values
            for pattern in p.patterns:
                mask = pattern.allows(torch.tensor(rows)[:, None], every, layout)
                part = logits.masked_fill(~mask, -torch.inf).softmax(1) @ values
                errors.append(float((part - full).square().mean()))
            pattern = p.patterns[errors.index(min(errors))]
            mask = mask_of(pattern)
            return {t: {u for u in own if mask[t, u]} for t in own}

        state = {"v": [x[4] for x in heads_of(q, k, v)], "at": 0}
        return by_keys(q, k, v, layout, seen)

    return run


PATTERNS: list[tuple[Selector, Output]] = [
    (pattern, oracle(pattern))  # type: ignore[operator]
    for pattern, oracle in (
        (KeyOrder(0.6, 7, 8), key_order),
        (ClusterBlocks(0.5, 2, 5, 7, 4, 8), cluster_blocks),
        (ClusterBlocks(0.5, 0.2, 4, 6, 3, 5, "interaction"), cluster_blocks),
        (Hashing(8, 9, 4), hashing),
        (
            OnlineChoice((Neighborhood((0.5, 0.5, 0.5)), Union(MultiDiagonal(1), Stripe())), 9, 8),
            online_choice,
        ),
    )
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["video", "odd", "image"])
@pytest.mark.parametrize(
    ("selector", "oracle"), PATTERNS, ids=[f"{n}-{s.name}" for n, (s, _) in enumerate(PATTERNS)]
)
def test_output_is_that_of_the_definition(
    selector: Selector, oracle: Output, layout: str
) -> None:
    check_output(selector, oracle, LAYOUTS[layout])
