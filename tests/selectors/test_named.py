"""Each named pattern against its own slow form, on odd layouts, ragged blocks, text and batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.selectors_oracle import (
    LAYOUTS,
    LONGER,
    SCALE,
    count,
    cut,
    descending,
    lengths,
    mask_of,
    masked_attention,
    mean,
    overlapping,
    softmax,
    tensors,
    touching,
    under,
    until,
)

from visattn import Grid, TokenLayout
from visattn.geometry.layout import valid_keys
from visattn.geometry.orders import BoxOrder, LineOrder, Order
from visattn.selectors import (
    ASA,
    NABLA,
    PISA,
    VSA,
    BiLevel,
    BlockSelector,
    DFSAttn,
    Draft,
    Hierarchical,
    Jenga,
    MoBA,
    ProxyHeads,
    Pyramid,
    Selector,
    Sparge,
    TopBlocks,
    VMoBA,
    XAttention,
)
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend

# ---- the masks, as their sources say them


def pooled(scaled: bool = True) -> Callable[..., float]:
    def score(q: torch.Tensor, k: torch.Tensor, own: list[int], block: list[int]) -> float:
        return float(mean(q, own) @ mean(k, block)) * (SCALE if scaled else 1.0)

    return score


def by_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    order: Order | str | tuple[Order | str, Order | str],
    size: int | tuple[int, int],
    score: Callable[..., float],
    choose: Callable[[dict[int, float], set[int], int], set[int]],
) -> torch.Tensor:
    """``choose(scores, own blocks, query block)`` for each row."""
    orders = order if isinstance(order, tuple) else (order, order)
    sizes = size if isinstance(size, tuple) else (size, size)
    q_cut, k_cut = cut(layout, orders[0], sizes[0]), cut(layout, orders[1], sizes[1])

    def row(i: int, scores: dict[int, float]) -> set[int]:
        return choose(scores, overlapping(q_cut[0][i], k_cut[0]) & set(scores), i)

    return mask_of(q, k, v, layout, q_cut, k_cut, score, row)


def best(
    keep: float, forced: bool = False, down: bool = False
) -> Callable[[dict[int, float], set[int], int], set[int]]:
    """The best blocks up to a number, and with ``forced`` the own ones before them."""

    def choose(scores: dict[int, float], own: set[int], i: int) -> set[int]:
        first = own if forced else set()
        others = {j: x for j, x in scores.items() if j not in first}
        number = count(keep, len(scores), down)
        return first | set(descending(others)[: max(0, number - len(first))])

    return choose


def share(
    mass: float, least: float = 1, forced: bool = False
) -> Callable[[dict[int, float], set[int], int], set[int]]:
    """The smallest set with a share of the softmax, at least some, and with ``forced`` the own
    blocks."""

    def choose(scores: dict[int, float], own: set[int], i: int) -> set[int]:
        kept = until(softmax(scores), mass)
        kept |= set(descending(scores)[: count(least, len(scores))])
        return kept | own if forced else kept

    return choose


def jenga(p: Jenga, q, k, v, layout):  # type: ignore[no-untyped-def]
    blocks = cut(layout, "hilbert", p.block)

    def choose(scores: dict[int, float], own: set[int], i: int) -> set[int]:
        near = touching(layout, blocks[0][i], *blocks) & set(scores)
        return near | share(p.mass, p.keep)(scores, own, i)

    return by_rows(q, k, v, layout, "hilbert", p.block, pooled(), choose)


def draft(p: Draft, q, k, v, layout):  # type: ignore[no-untyped-def]
    """All pairs of a head compete by their share of their row."""
    order, size = BoxOrder((1, *p.tile)), p.tile[0] * p.tile[1]
    blocks, kinds = cut(layout, order, size)
    out = torch.ones(*q.shape[:3], layout.length, dtype=torch.bool)
    grid = [n for n, kind in enumerate(kinds) if kind]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            pairs: dict[tuple[int, int], float] = {}
            for i in grid:
                rows = {
                    j: pooled()(q[b, h], k[b, h // 2], blocks[i], blocks[j]) for j in grid
                }
                pairs |= {(i, j): x for j, x in softmax(rows).items()}
            order_ = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
            first = {next(pair for pair in order_ if pair[0] == i) for i in grid}
            if p.own:
                first |= {(i, i) for i in grid}
            others = [pair for pair in order_ if pair not in first]
            number = math.ceil(p.keep * len(pairs) - 1e-9)
            kept = first | set(others[: max(0, number - len(first))])
            for i in grid:
                for j in grid:
                    if (i, j) not in kept:
                        out[b, h, torch.tensor(blocks[i])[:, None], torch.tensor(blocks[j])] = False
    return out


def dfsattn(p: DFSAttn, q, k, v, layout):  # type: ignore[no-untyped-def]
    blocks, kinds = cut(layout, "hilbert", p.block)

    def parts(block: list[int]) -> list[list[int]]:
        return [block[n : n + p.part] for n in range(0, len(block), p.part)]

    all_parts = [part for n, block in enumerate(blocks) if kinds[n] for part in parts(block)]

    def score(q_: torch.Tensor, k_: torch.Tensor, own: list[int], block: list[int]) -> float:
        total = 0.0
        for part in parts(own):
            query = mean(q_, part)
            logits = [float(query @ mean(k_, other)) * SCALE for other in all_parts]
            probability = softmax(dict(enumerate(logits)))
            total += sum(x for n, x in probability.items() if all_parts[n][0] in block)
        return math.log(total)

    return by_rows(
        q, k, v, layout, "hilbert", p.block, score, best(p.keep, p.own, down=True)
    )


def nabla(p: NABLA, q, k, v, layout):  # type: ignore[no-untyped-def]
    size = p.tile[0] * p.tile[1] * p.tile[2]
    rows = share(p.mass, forced=p.own)
    out = by_rows(q, k, v, layout, BoxOrder(p.tile), size, pooled(), rows)
    if p.window is not None:
        begin, grid = layout.grids[0]
        kept = torch.ones(grid.numel, grid.numel, dtype=torch.bool)
        for axis, side, wide, length in zip(
            grid.coordinates(torch.arange(grid.numel)), p.tile, p.window, grid.shape, strict=True
        ):
            own, half = axis // side, wide // 2
            middle = own
            if p.clamped:
                middle = own.clamp(half, -(-length // side) - 1 - half)
            kept &= (middle[:, None] - own).abs() <= half
        end = begin + grid.numel
        out[:, :, begin:end, begin:end] |= kept
    return out


def vsa(p: VSA, q, k, v, layout):  # type: ignore[no-untyped-def]
    size = p.tile[0] * p.tile[1] * p.tile[2]
    return by_rows(q, k, v, layout, BoxOrder(p.tile), size, pooled(), best(p.keep, p.own))


def asa(p: ASA, q, k, v, layout):  # type: ignore[no-untyped-def]
    own_score = p.stages(layout).score
    q_at, k_at = (own_score.places(p.block, p.samples, salt) for salt in (0, 1))  # type: ignore[attr-defined]
    blocks, kinds = cut(layout, "hilbert", p.block)

    def at(block: list[int], places: list[int]) -> list[int]:
        return [block[n] for n in places if n < len(block)]

    drawn = [t for n, block in enumerate(blocks) if kinds[n] for t in at(block, k_at)]

    def score(q_: torch.Tensor, k_: torch.Tensor, own: list[int], block: list[int]) -> float:
        found = -math.inf
        for query in at(own, q_at) or own[:1]:
            logits = {t: float(q_[query] @ k_[t]) * SCALE for t in drawn}
            probability = softmax(logits)
            found = max([found, *(probability[t] for t in at(block, k_at))])
        return math.log(found) if found > 0 else -math.inf

    return by_rows(q, k, v, layout, "hilbert", p.block, score, share(p.mass, forced=p.own))


def xattention(p: XAttention, q, k, v, layout):  # type: ignore[no-untyped-def]
    blocks, kinds = cut(layout, "raster", p.block)

    def cells(block: list[int]) -> list[list[int | None]]:
        runs = [block[n : n + p.stride] for n in range(0, len(block), p.stride)]
        return [[*run, *[None] * (p.stride - len(run))] for run in runs]

    columns = [(n, cell) for n, block in enumerate(blocks) if kinds[n] for cell in cells(block)]

    def score(q_: torch.Tensor, k_: torch.Tensor, own: list[int], block: list[int]) -> float:
        number = blocks.index(block)
        total = 0.0
        for cell in cells(own):
            logits = {}
            for c, (_, other) in enumerate(columns):
                pairs = [(cell[p.stride - 1 - n], other[n]) for n in range(p.stride)]
                terms = [float(q_[a] @ k_[b]) for a, b in pairs if a is not None and b is not None]
                logits[c] = sum(terms) * SCALE / p.stride
            probability = softmax(logits)
            total += sum(x for c, x in probability.items() if columns[c][0] == number)
        return math.log(total)

    def choose(scores: dict[int, float], own: set[int], i: int) -> set[int]:
        kept = share(p.mass, forced=p.own)(scores, own, i)
        return kept | {min(scores)} if p.sink else kept

    return by_rows(q, k, v, layout, "raster", p.block, score, choose)


def moba(p: MoBA, q, k, v, layout):  # type: ignore[no-untyped-def]
    order = ("raster" if p.queries == 1 else p.order, p.order)
    sizes = (p.queries, p.block)
    return by_rows(q, k, v, layout, order, sizes, pooled(False), best(p.keep, True))


def top_blocks(p: TopBlocks, q, k, v, layout):  # type: ignore[no-untyped-def]
    def score(q_: torch.Tensor, k_: torch.Tensor, own: list[int], block: list[int]) -> float:
        return pooled()(q_, k_, own, block) + math.log(len(block))

    return by_rows(q, k, v, layout, p.order, p.block, score, best(p.keep, True))


def sparge(p: Sparge, q, k, v, layout):  # type: ignore[no-untyped-def]
    q_cut, k_cut = (cut(layout, p.order, size) for size in (p.block_q, p.block_k))

    def alike(x: torch.Tensor, block: list[int]) -> bool:
        unit = x[block] / x[block].norm(dim=1, keepdim=True)
        return float((unit @ unit.T).mean()) > p.similar

    out = torch.ones(*q.shape[:3], layout.length, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            own_q, own_k = q[b, h], k[b, h // 2]
            smooth = own_k - own_k.mean(0)
            good = {j: alike(smooth, block) for j, block in enumerate(k_cut[0])}
            for i, q_block in enumerate(q_cut[0]):
                if not q_cut[1][i] or not alike(own_q, q_block):
                    continue
                grid = {j for j, kind in enumerate(k_cut[1]) if kind}
                scores = {
                    j: pooled()(own_q, own_k, q_block, k_cut[0][j]) for j in grid if good[j]
                }
                kept = {j for j in grid if not good[j]}
                if p.own:
                    kept |= overlapping(q_block, k_cut[0])
                if scores:
                    prefix = until if p.crossing else under
                    kept |= prefix(softmax(scores), p.mass) | {descending(scores)[0]}
                for j in grid - kept:
                    out[b, h, torch.tensor(q_block)[:, None], torch.tensor(k_cut[0][j])] = False
    return out


def bi_level(p: BiLevel, q, k, v, layout):  # type: ignore[no-untyped-def]
    size = p.region[0] * p.region[1] * p.region[2]
    keys = k.repeat_interleave(2, 1)
    joint_q, joint_k = (x.transpose(1, 2).flatten(2)[:, None] for x in (q, keys))
    own = by_rows(joint_q, joint_k, joint_k, layout, BoxOrder(p.region), size, pooled(),
                  best(p.keep, p.own))
    return own.expand(-1, 4, -1, -1)


def hierarchical(p: Hierarchical, q, k, v, layout):  # type: ignore[no-untyped-def]
    blocks, kinds = cut(layout, p.order, p.block)

    def sized(x: torch.Tensor, keys: torch.Tensor, own: list[int], tokens: list[int]) -> float:
        return float(mean(x, own) @ mean(keys, tokens)) * SCALE + math.log(len(tokens))

    regions = {}
    for n in range(0, len(blocks), p.region):
        inside = [j for j in range(n, min(n + p.region, len(blocks))) if kinds[j]]
        if inside:
            regions[n // p.region] = inside
    out = torch.ones(*q.shape[:3], layout.length, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            own_q, own_k = q[b, h], k[b, h // 2]
            for i, q_block in enumerate(blocks):
                if not kinds[i]:
                    continue
                coarse = {
                    r: sized(own_q, own_k, q_block, [t for j in inside for t in blocks[j]])
                    for r, inside in regions.items()
                }
                looked = descending(coarse)[: count(p.regions, len(coarse))]
                fine = {
                    j: sized(own_q, own_k, q_block, blocks[j]) for r in looked for j in regions[r]
                }
                total = sum(kinds)
                kept = {i, *descending(fine)[: count(p.keep, total)]}
                for j in range(len(blocks)):
                    if kinds[j] and j not in kept:
                        out[b, h, torch.tensor(q_block)[:, None], torch.tensor(blocks[j])] = False
    return out


def vmoba(p: VMoBA, q, k, v, layout):  # type: ignore[no-untyped-def]
    grid = layout.grids[0][1]
    if p.partition == "1d":
        k_order: Order = LineOrder()
        size = min(p.frames, grid.frames) * grid.height * grid.width
    else:
        sides = (grid.frames, *p.window) if p.partition == "2d" else p.box
        tile = [min(a, b) for a, b in zip(sides, grid.shape, strict=True)]
        k_order, size = BoxOrder((tile[0], tile[1], tile[2])), tile[0] * tile[1] * tile[2]
    q_order = "raster" if p.queries == 1 else "tiles"
    q_blocks, q_kinds = cut(layout, q_order, p.queries)
    k_blocks, k_kinds = cut(layout, k_order, size)
    rows = [i for i, kind in enumerate(q_kinds) if kind]
    columns = [j for j, kind in enumerate(k_kinds) if kind]
    out = torch.ones(*q.shape[:3], layout.length, dtype=torch.bool)
    for b in range(q.shape[0]):
        gates = {
            (h, i, j): float(mean(q[b, h], q_blocks[i]) @ mean(k[b, h // 2], k_blocks[j]))
            for h in range(4)
            for i in rows
            for j in columns
        }
        own = {
            (h, i, j) for h in range(4) for i in rows for j in overlapping(q_blocks[i], k_blocks)
        } & set(gates)
        scope_of = {
            "query": lambda n: (n[0], n[1]),
            "block": lambda n: n[2],
            "head": lambda n: n[0],
            "overall": lambda n: 0,
        }[p.scope]
        scopes: dict[object, list[tuple[int, int, int]]] = {}
        for n in gates:
            scopes.setdefault(scope_of(n), []).append(n)
        kept = set(own)
        for members in scopes.values():
            if p.share is None:
                free = sorted((n for n in members if n not in own), key=lambda n: (-gates[n], n))
                number = (
                    p.keep * (len(members) // len(columns))
                    if isinstance(p.keep, int)
                    else count(p.keep, len(members))
                )
                kept |= set(free[: max(0, number - len(own & set(members)))])
                continue
            low = min(gates[n] for n in members)
            high = max(gates[n] for n in members)
            normal = {n: (gates[n] - low) / (high - low + 1e-6) for n in members}
            total = sum(normal.values())
            held = sum(normal[n] for n in members if n in own)
            others = sorted((n for n in members if n not in own), key=lambda n: (-gates[n], n))
            for turn, n in enumerate(others):
                if held >= p.share * total - 1e-4 and (turn > 0 or not p.more):
                    break
                kept.add(n)
                held += normal[n]
        for h, i, j in set(gates) - kept:
            out[b, h, torch.tensor(q_blocks[i])[:, None], torch.tensor(k_blocks[j])] = False
    return out


MASKED: list[tuple[BlockSelector, Callable[..., torch.Tensor]]] = [
    (TopBlocks(0.3, block=8), top_blocks),
    (TopBlocks(3, block=6, order="hilbert"), top_blocks),
    (Jenga(0.3, 0.1, block=8), jenga),
    (Draft(0.3, (2, 3)), draft),
    (DFSAttn(0.4, block=9, part=4), dfsattn),
    (NABLA(0.6, None, (1, 2, 3)), nabla),
    (VSA(0.3, (2, 2, 2)), vsa),
    (ASA(0.7, block=8, samples=3), asa),
    (XAttention(0.6, stride=3, block=8), xattention),
    (MoBA(0.3, block=6), moba),
    (MoBA(2, block=9, queries=4, order="tiles"), moba),
    (Sparge(0.6, 0.2, block_q=8, block_k=4), sparge),
    (BiLevel(0.4, (1, 2, 2)), bi_level),
    (Hierarchical(0.2, 0.5, 3, block=4), hierarchical),
    (VMoBA("1d", 2, queries=4), vmoba),
    (VMoBA("2d", window=(2, 3), queries=4, scope="query"), vmoba),
    (VMoBA("3d", box=(2, 2, 2), queries=4, scope="block", share=0.4), vmoba),
    (VMoBA("3d", box=(2, 2, 2), queries=4, scope="overall"), vmoba),
    (VMoBA("3d", box=(2, 2, 3), queries=1, scope="head"), vmoba),
    (VMoBA("3d", box=(2, 2, 2), queries=4, share=None, keep=0.3), vmoba),
    (VMoBA("2d", window=(2, 2), queries=1, share=None, keep=2, scope="query"), vmoba),
]


# the settings that are not the default: mostly what the papers say, where the code does otherwise
OPTIONS: list[tuple[BlockSelector, Callable[..., torch.Tensor]]] = [
    (Draft(0.3, (2, 3), own=True), draft),
    (Draft(0.05, (2, 3)), draft),  # fewer pairs than rows
    (DFSAttn(0.4, block=9, part=4, own=True), dfsattn),
    (DFSAttn(0.01, block=9, part=4), dfsattn),
    (NABLA(0.4, (1, 3, 3), (1, 2, 2)), nabla),
    (NABLA(0.4, (1, 3, 3), (1, 2, 2), clamped=True), nabla),
    (NABLA(0.3, (11, 3, 2), (2, 3, 2), own=True), nabla),  # a window beyond the grid
    (VSA(0.3, (2, 2, 2), own=True), vsa),
    (ASA(0.5, block=8, samples=3, own=True), asa),
    (XAttention(0.5, stride=3, block=8, sink=False, own=True), xattention),
    (Sparge(0.6, 0.2, block_q=8, block_k=4, crossing=True, own=True), sparge),
    (BiLevel(0.4, (1, 2, 2), own=True), bi_level),
    (VMoBA("3d", box=(2, 2, 2), queries=4, scope="block", share=0.1, more=False), vmoba),
    (VMoBA("2d", window=(2, 3), queries=4, share=0.1, more=False), vmoba),
]


def outputs(selector: Selector, layout: TokenLayout) -> tuple[torch.Tensor, ...]:
    q, k, v = tensors(layout)
    selection = selector.select(q, k, v, layout, SCALE)
    return tuple(
        run(q, k, v, selection, layout, lengths(layout), SCALE)[0]
        for run in (attend, reference_attend)
    )


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("selector", "mask"), MASKED, ids=[f"{n}-{s.name}" for n, (s, _) in enumerate(MASKED)]
)
def test_mask_is_that_of_the_definition(selector, mask, layout):  # type: ignore[no-untyped-def]
    q, k, v = tensors(layout)
    expected_mask = mask(selector, q, k, v, layout)
    text = lengths(layout)
    valid = None if text is None else valid_keys(text, layout)
    expected = masked_attention(q, k, v, expected_mask, SCALE, valid)
    for out in outputs(selector, layout):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("selector", "mask"), OPTIONS, ids=[f"{n}-{s.name}" for n, (s, _) in enumerate(OPTIONS)]
)
def test_mask_with_other_options(selector, mask):  # type: ignore[no-untyped-def]
    layout = LONGER
    q, k, v = tensors(layout, batch=1)
    text = lengths(layout, batch=1)
    assert text is not None
    selection = selector.select(q, k, v, layout, SCALE)
    out, _ = attend(q, k, v, selection, layout, text, SCALE)
    expected_mask = mask(selector, q, k, v, layout)
    expected = masked_attention(q, k, v, expected_mask, SCALE, valid_keys(text, layout))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


# the least that can be asked for, where the own block is not forced
LEAST = [
    Draft(0.01, (2, 3)), DFSAttn(0.001, 8, 4), NABLA(1e-6, None, (1, 2, 3)), VSA(0.001, (2, 2, 2)),
    PISA(0.001, 8), ASA(1e-6, 8, 3), XAttention(1e-6, 4, 8, sink=False), Sparge(0.0001, -1, 8, 8),
    BiLevel(0.001, (1, 2, 2)), ProxyHeads(1e-6, 1, 3, 8),
    Pyramid((0.0,) * 4, "count", 8), Pyramid((0.0,) * 4, block=8, least=0.001),
]


@pytest.mark.parametrize("selector", LEAST, ids=lambda own: own.name)
def test_no_row_is_without_a_key(selector):  # type: ignore[no-untyped-def]
    layout = TokenLayout(Grid(3, 5, 6))
    selection = selector.select(*tensors(layout, batch=1), layout, SCALE)
    seen = (selection.levels == 1).sum(-1)
    assert bool((seen == 1).all()), seen
