"""Named patterns that do more than mask, each against its own slow form: means with weights,
levels, corrections."""

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
    lengths,
    mean,
    overlapping,
    softmax,
    tensors,
    tokens_of,
    touching,
    until,
    whole,
)

from visattn import TokenLayout
from visattn.geometry.orders import BoxOrder
from visattn.selectors import (
    PISA,
    Agent,
    CoreContext,
    ProxyHeads,
    Pyramid,
    Rectified,
    Selector,
    TopBlocks,
)
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend


def leveled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    order: str,
    size: int,
    levels: Callable[[torch.Tensor, torch.Tensor, int, list[int], list[int]], dict[int, int]],
    variance: bool = False,
) -> torch.Tensor:
    """``levels(q, k, query block, grid blocks)`` gives the pool of each grid block that is seen."""
    blocks, kinds = cut(layout, order, size)
    grid = [n for n, kind in enumerate(kinds) if kind]
    out = torch.zeros_like(q)
    for b, h, own_q, own_k, own_v in heads_of(q, k, v):
        valid = whole(layout, q, b)
        for i, q_block in enumerate(blocks):
            pools = {j: 1 for j, kind in enumerate(kinds) if not kind}
            pools |= levels(own_q, own_k, i, q_block, grid) if kinds[i] else dict.fromkeys(grid, 1)
            for token in q_block:
                parts = []
                for j, pool in pools.items():
                    parts += tokens_of(own_q[token], own_k, own_v, blocks[j], pool, valid, variance)
                out[b, h, token] = combined(own_q[token], parts)
    return out


def top_with_rest(p: TopBlocks | PISA, order: str, variance: bool, sized: bool) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        blocks, _ = cut(layout, order, p.block)

        def levels(own_q, own_k, i, q_block, grid):  # type: ignore[no-untyped-def]
            scores = {
                j: float(mean(own_q, q_block) @ mean(own_k, blocks[j])) * SCALE
                + (math.log(len(blocks[j])) if sized else 0)
                for j in grid
            }
            if isinstance(p, PISA):
                kept = set(descending(scores)[: count(p.keep, len(grid), down=True)])
            else:
                others = {j: x for j, x in scores.items() if j != i}
                kept = {i, *descending(others)[: count(p.keep, len(grid)) - 1]}
            return {j: 1 if j in kept else p.block for j in grid}

        return leveled(q, k, v, layout, order, p.block, levels, variance)

    return run


def pyramid(p: Pyramid) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        blocks, _ = cut(layout, p.order, p.block)

        def cap(own_k: torch.Tensor, block: list[int]) -> int:
            if p.similar is None:
                return 8
            keys = own_k[block] / own_k[block].norm(dim=1, keepdim=True)
            best = 1
            for pool, least in zip((2, 4, 8), p.similar, strict=True):
                starts = range(0, len(block) - pool + 1, 1 if p.nested else pool)
                pairs = [float(keys[n] @ keys[n + pool - 1]) for n in starts]
                if not pairs or sum(pairs) / len(pairs) > least:
                    best = pool
                elif p.nested:
                    break
            return best

        def levels(own_q, own_k, i, q_block, grid):  # type: ignore[no-untyped-def]
            query = mean(own_q, q_block)
            scores = {
                j: float(torch.logsumexp(own_k[blocks[j]] @ query * SCALE, 0)) for j in grid
            }
            if p.by == "mass":
                sets = [until(softmax(scores), end) for end in p.ends]
            else:
                sets = [set(descending(scores)[: int(end * len(grid))]) for end in p.ends]
            least = p.least if p.by == "mass" else 1
            sets[0] |= set(descending(scores)[: count(least, len(grid))])
            out = {}
            for j in grid:
                level = next((x for x, own in zip((1, 2, 4, 8), sets, strict=True) if j in own), 0)
                if j == i and p.own:
                    level = 1
                if level:
                    out[j] = min(level, cap(own_k, blocks[j]))
                elif p.pooled:
                    out[j] = p.block
            return out

        return leveled(q, k, v, layout, p.order, p.block, levels)

    return run


def proxy_heads(p: ProxyHeads) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        blocks, kinds = cut(layout, p.order, p.block)
        grid = [n for n, kind in enumerate(kinds) if kind]
        keys = k.repeat_interleave(2, 1)
        each = 4 // p.groups
        sampled = {j: blocks[j][:: p.stride] for j in range(len(blocks))}
        all_keys = [t for j in grid for t in sampled[j]]
        plan: dict[tuple[int, int], dict[int, int]] = {}
        for b in range(q.shape[0]):
            for h in range(4):
                own = slice(h // each * each, h // each * each + each)
                group_q, group_k = q[b, own].mean(0), keys[b, own].mean(0)
                counts, ranks = [], {}
                for i in grid:
                    scores = {
                        j: float(mean(q[b, h], blocks[i]) @ mean(keys[b, h], blocks[j])) * SCALE
                        for j in grid
                    }
                    counts.append(len(until(softmax(scores), p.mass)))
                    found = dict.fromkeys(grid, 0.0)
                    for t in sampled[i]:
                        logits = {u: float(group_q[t] @ group_k[u]) * SCALE for u in all_keys}
                        probability = softmax(logits)
                        for j in grid:
                            found[j] = max(found[j], *(probability[u] for u in sampled[j]))
                    ranks[i] = found
                budget = max(1, math.ceil(sum(counts) / len(counts) - 1e-9))
                for i in grid:
                    plan[b, h, i] = dict.fromkeys(descending(ranks[i])[:budget], 1)
        at = iter([(b, h) for b in range(q.shape[0]) for h in range(4)])
        state: dict[str, tuple[int, int]] = {}

        def levels(own_q, own_k, i, q_block, grid_):  # type: ignore[no-untyped-def]
            if i == grid_[0]:
                state["at"] = next(at)
            return plan[(*state["at"], i)]

        return leveled(q, k, v, layout, p.order, p.block, levels)

    return run


def core_context(p: CoreContext) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        blocks, kinds = cut(layout, p.order, p.block)
        grid = [n for n, kind in enumerate(kinds) if kind]
        out = torch.zeros_like(q)
        for b, h, own_q, own_k, own_v in heads_of(q, k, v):
            valid = whole(layout, q, b)
            core = {}
            for j in grid:
                weight = (own_k[blocks[j]] @ mean(own_q, blocks[j]) * SCALE).softmax(0)
                entropy = -float((weight * weight.log()).sum())
                core[j] = (weight @ own_k[blocks[j]], weight @ own_v[blocks[j]], entropy)
            for i, q_block in enumerate(blocks):
                if not kinds[i]:
                    near = set(range(len(blocks)))
                else:
                    scores = {
                        j: float(mean(own_q, q_block) @ mean(own_k, blocks[j])) * SCALE
                        + math.log(len(blocks[j]))
                        for j in grid
                    }
                    near = touching(layout, q_block, blocks, kinds)
                    free = {j: x for j, x in scores.items() if j not in near}
                    near |= set(descending(free)[: max(0, count(p.keep, len(grid)) - len(near))])
                    near |= {j for j, kind in enumerate(kinds) if not kind}
                for token in q_block:
                    parts = []
                    for j in range(len(blocks)):
                        if j in near:
                            parts += tokens_of(own_q[token], own_k, own_v, blocks[j], 1, valid)
                        else:
                            key, value, entropy = core[j]
                            parts.append((own_q[token] @ key * SCALE + entropy, value))
                    out[b, h, token] = combined(own_q[token], parts)
        return out

    return run


def rectified(p: Rectified) -> Output:
    def run(q, k, v, layout):  # type: ignore[no-untyped-def]
        blocks, kinds = cut(layout, "hilbert", p.block)
        grid = [n for n, kind in enumerate(kinds) if kind]
        out = torch.zeros_like(q)
        for b, h, own_q, own_k, own_v in heads_of(q, k, v):
            valid = whole(layout, q, b)
            for i, q_block in enumerate(blocks):
                factor, extra = 1.0, torch.zeros_like(own_v[0])
                kept = set(range(len(blocks)))
                if kinds[i]:
                    query = mean(own_q, q_block)
                    scores = {j: float(query @ mean(own_k, blocks[j])) * SCALE for j in grid}
                    probability = softmax(scores)
                    kept = until(probability, p.mass) | touching(layout, q_block, blocks, kinds)
                    kept |= set(descending(scores)[: count(p.keep, len(grid))])
                    trusted = set(kept)
                    for j in grid:
                        key = mean(own_k, blocks[j])
                        q_apart = (own_q[q_block] - query).abs().mean(0)
                        k_apart = (own_k[blocks[j]] - key).abs().mean(0)
                        gain = abs(float(query @ key))
                        if gain <= abs(float(q_apart @ key)) + abs(float(query @ k_apart)):
                            trusted.add(j)
                    factor = sum(probability[j] for j in grid if j in trusted)
                    for j in set(grid) - trusted:
                        extra = extra + probability[j] * mean(own_v, blocks[j])
                    kept |= {j for j, kind in enumerate(kinds) if not kind}
                for token in q_block:
                    parts = []
                    for j in sorted(kept):
                        parts += tokens_of(own_q[token], own_k, own_v, blocks[j], 1, valid)
                    out[b, h, token] = combined(own_q[token], parts) * factor + extra
        return out

    return run


PATTERNS: list[tuple[Selector, Output]] = []
for _rest in ("pooled", "variance"):
    _own = TopBlocks(0.3, rest=_rest, block=7, order="hilbert")
    PATTERNS.append((_own, top_with_rest(_own, "hilbert", _rest == "variance", True)))
for _make, _oracle in (
    (PISA(0.3, 8, first_order=False), lambda p: top_with_rest(p, "tiles", False, False)),
    (Pyramid((0.2, 0.4, 0.6, 0.8), block=8), pyramid),
    (Pyramid((0.1, 0.3, 0.6, 0.9), "count", 6, "raster", pooled=True), pyramid),
    (Pyramid((0.2, 0.4, 0.6, 0.8), block=9, similar=(0.1, 0.0, -0.1)), pyramid),
    (Pyramid(block=9, similar=(0.1, 0.0, -0.1), nested=True, own=True), pyramid),
    (ProxyHeads(0.7, 2, 3, 8), proxy_heads),
    (CoreContext(3, 8), core_context),
    (Rectified(0.3, 0.1, 8), rectified),
):
    PATTERNS.append((_make, _oracle(_make)))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", ["video", "odd", "image"])
@pytest.mark.parametrize(
    ("selector", "oracle"), PATTERNS, ids=[f"{n}-{s.name}" for n, (s, _) in enumerate(PATTERNS)]
)
def test_output_is_that_of_the_definition(
    selector: Selector, oracle: Output, layout: str
) -> None:
    # the pooled softmax of the correction is in float32
    atol = 1e-6 if isinstance(selector, Rectified) else 1e-9
    check_output(selector, oracle, LAYOUTS[layout], atol)


def test_the_first_order_of_pisa() -> None:
    layout = LAYOUTS["video"]
    q, k, v = tensors(layout)
    plain, first = PISA(0.3, 8, first_order=False), PISA(0.3, 8)
    zeroth, _ = attend(q, k, v, plain.select(q, k, v, layout, SCALE), layout, None, SCALE)
    selection = first.select(q, k, v, layout, SCALE)
    blocks, kinds = cut(layout, "tiles", 8)
    grid = layout.grids[0][1]
    expected = zeroth.clone()
    for b, h, own_q, own_k, own_v in heads_of(q, k, v):
        slope = torch.zeros(8, 8, dtype=torch.float64)
        for block, kind in zip(blocks, kinds, strict=True):
            for token in block if kind else ():
                slope += torch.outer(own_k[token] - mean(own_k, block), own_v[token])
        for i, q_block in enumerate(blocks):
            if not kinds[i]:
                continue
            seen = selection.levels[b, h, i].tolist()
            for token in q_block:
                total, rest = 0.0, 0.0
                for block, level in zip(blocks, seen, strict=True):
                    if level == 1:
                        total += float((own_k[block] @ own_q[token] * SCALE).exp().sum())
                    else:
                        logit = float(own_q[token] @ mean(own_k, block)) * SCALE
                        own = len(block) * math.exp(logit)
                        total, rest = total + own, rest + own
                expected[b, h, token] += rest / total * SCALE / grid.numel * (own_q[token] @ slope)
    for run in (attend, reference_attend):
        out, _ = run(q, k, v, selection, layout, None, SCALE)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_agents_stand_between(layout: TokenLayout) -> None:
    q, k, v = tensors(layout)
    box = (1, 2, 2)
    out = Agent(box, 0.7, 0.1).run(q, k, v, layout, lengths(layout), SCALE)
    blocks, kinds = cut(layout, BoxOrder(box), 4)
    for b, h, own_q, own_k, own_v in heads_of(q, k, v):
        valid = whole(layout, q, b)
        agents = [mean(own_q, block) for block, kind in zip(blocks, kinds, strict=True) if kind]
        agents += [
            own_q[t]
            for block, kind in zip(blocks, kinds, strict=True)
            if not kind
            for t in block
            if valid[t]
        ]
        keys = [t for t in range(layout.length) if valid[t]]
        values = [(agent @ own_k[keys].T * SCALE).softmax(0) @ own_v[keys] for agent in agents]
        for token in range(layout.length):
            weights = (torch.stack(agents) @ own_q[token] * SCALE * 0.7).softmax(0)
            expected = weights @ torch.stack(values) + 0.1 * own_v[token]
            torch.testing.assert_close(out[b, h, token], expected, rtol=0, atol=1e-9)


def test_own_blocks_are_seen_where_they_are_asked_for() -> None:
    layout = LAYOUTS["video"]
    for selector in (
        TopBlocks(0.1, block=7), PISA(0.1, 8, own=True), Pyramid(block=8, own=True),
        ProxyHeads(0.3, 2, 3, 8, own=True), CoreContext(1, 8), Rectified(0.1, 0.1, 8),
    ):
        selection = selector.select(*tensors(layout), layout, SCALE)
        q_blocks = [selection.q_side.tokens[0, 0, n].tolist() for n in range(len(selection.q_side))]
        for n, block in enumerate(q_blocks):
            for j in overlapping(block, q_blocks):
                assert bool((selection.levels[:, :, n, j] == 1).all())


def test_published_agents() -> None:
    """AgentSD at a head size of 64: ``s2 = s^0.3``, 4.29 times ``s^1``, and 0.075 of the values."""
    layout = LAYOUTS["line"]
    q, k, v = tensors(layout)
    scale = 64**-0.5
    out = Agent((1, 1, 3)).run(q, k, v, layout, None, scale)
    same = Agent((1, 1, 3), second=64**0.35, shortcut=0.075).run(q, k, v, layout, None, scale)
    torch.testing.assert_close(out, same, rtol=0, atol=1e-12)
