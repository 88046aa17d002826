"""Slow forms of the named patterns, written from their definitions: loops, sorts and dense masks in
float64. Only the token orders come from the package, which tests them by themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from visattn.geometry.layout import Grid, TokenLayout, valid_keys
from visattn.geometry.orders import BoxOrder, HilbertOrder, LineOrder, Order, fitted
from visattn.patterns import parse_pattern
from visattn.selectors import SELECTORS, Selector
from visattn.selectors.attend.dynamic_blockwise import attend
from visattn.selectors.attend.dynamic_reference import reference_attend

Blocks = list[list[int]]
Output = Callable[..., torch.Tensor]

LAYOUTS = {
    "video": TokenLayout(Grid(3, 4, 5), text_after=7),
    "odd": TokenLayout(Grid(2, 7, 3), text_before=5),
    "image": TokenLayout(Grid(1, 9, 7), text_before=3, text_after=2),
    "line": TokenLayout(Grid(5, 1, 3)),
}
LONGER = TokenLayout(Grid(3, 5, 6), text_after=7)
SCALE = 0.3
# every selector, small enough for the layouts of the tests
SMALL = {name: kind.example for name, kind in SELECTORS.items()}


def small(name: str) -> Selector:
    selector = parse_pattern(SMALL[name])
    assert isinstance(selector, Selector)
    return selector


def tensors(layout: TokenLayout, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(layout.length)
    q = torch.randn(batch, 4, layout.length, 8, generator=generator, dtype=torch.float64) * 2
    k, v = (
        torch.randn(batch, 2, layout.length, 8, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return q, k, v


def lengths(layout: TokenLayout, batch: int = 2) -> torch.Tensor | None:
    if not layout.texts:
        return None
    columns = [[max(0, n - 2 * b) for b in range(batch)] for _, n in layout.texts]
    return torch.tensor(columns).T.contiguous()


def cut(layout: TokenLayout, order: Order | str, size: int) -> tuple[Blocks, list[bool]]:
    """The tokens of each block in the sequence's order, and which blocks are of a grid."""
    blocks: Blocks = []
    kinds: list[bool] = []
    for begin, segment in zip(layout.starts, layout.segments, strict=True):
        if segment.grid is None:
            tokens = list(range(begin, begin + segment.length))
            parts = [tokens[n : n + size] for n in range(0, len(tokens), size)]
        else:
            own = named(order, segment.grid, size)
            index = [begin + n for n in own.index(segment.grid).tolist()]
            cuts = own.blocks(segment.grid, size)
            runs = zip(cuts.start.tolist(), cuts.length.tolist(), strict=True)
            parts = [index[a : a + n] for a, n in runs]
        blocks += parts
        kinds += [segment.grid is not None] * len(parts)
    return blocks, kinds


def named(order: Order | str, grid: Any, size: int) -> Order:
    if not isinstance(order, str):
        return order
    if order == "tiles":
        side = 2 ** int(math.log2(size) / 3 + 1e-9)
        return BoxOrder(fitted((side,) * 3, grid, size))
    return HilbertOrder() if order == "hilbert" else LineOrder()


def heads_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """(b, h, q [L, D], k [L, D], v [L, D]) of every batch item and query head."""
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            yield b, h, q[b, h], k[b, h // share], v[b, h // share]


def mean(x: torch.Tensor, block: list[int]) -> torch.Tensor:
    return x[block].sum(0) / len(block)


def descending(values: dict[int, float]) -> list[int]:
    """Keys by value descending, equal ones ascending."""
    return sorted(values, key=lambda n: (-values[n], n))


def softmax(values: dict[int, float]) -> dict[int, float]:
    best = max(values.values())
    weights = {n: math.exp(value - best) for n, value in values.items()}
    total = sum(weights.values())
    return {n: weight / total for n, weight in weights.items()}


def until(probability: dict[int, float], share: float) -> set[int]:
    """The smallest set of the most probable that holds a share."""
    out: set[int] = set()
    held = 0.0
    for n in descending(probability):
        if held >= share * sum(probability.values()) - 1e-9:
            break
        out.add(n)
        held += probability[n]
    return out


def under(probability: dict[int, float], share: float) -> set[int]:
    """The most probable while they hold no more than a share, and the first one in any case."""
    out: set[int] = set()
    held = 0.0
    for n in descending(probability):
        held += probability[n]
        if out and held > share * sum(probability.values()) + 1e-9:
            break
        out.add(n)
    return out


def count(keep: float, total: int, down: bool = False) -> int:
    """A number, or a share of a total: rounded up, or down; at least 1."""
    if isinstance(keep, int):
        return keep
    return max(1, int(keep * total) if down else math.ceil(keep * total - 1e-6))


def overlapping(block: list[int], blocks: Blocks) -> set[int]:
    return {n for n, other in enumerate(blocks) if set(block) & set(other)}


@functools.cache
def close(layout: TokenLayout) -> torch.Tensor:
    """Grid tokens that are the same or next to each other along each axis, bool ``[L, L]``."""
    begin, grid = layout.grids[0]
    places = torch.stack(grid.coordinates(torch.arange(grid.numel)), 1)
    out = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    own = slice(begin, begin + grid.numel)
    out[own, own] = ((places[:, None] - places).abs() <= 1).all(-1)
    return out


def touching(layout: TokenLayout, block: list[int], blocks: Blocks, kinds: list[bool]) -> set[int]:
    """Grid blocks with a token next to one of a block."""
    near = close(layout)[block].any(0)
    return {n for n, other in enumerate(blocks) if kinds[n] and bool(near[other].any())}


Row = Callable[[int, dict[int, float]], set[int]]


def mask_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: TokenLayout,
    q_cut: tuple[Blocks, list[bool]],
    k_cut: tuple[Blocks, list[bool]],
    score: Callable[[torch.Tensor, torch.Tensor, list[int], list[int]], float],
    row: Row,
) -> torch.Tensor:
    """Token mask ``[B, H, L, L]``: ``row`` chooses grid key blocks of a grid query block from their
    scores; everything outside the grid is kept."""
    (q_blocks, q_kinds), (k_blocks, k_kinds) = q_cut, k_cut
    out = torch.ones(*q.shape[:3], layout.length, dtype=torch.bool)
    for b, h, own_q, own_k, _ in heads_of(q, k, v):
        for i, q_block in enumerate(q_blocks):
            if not q_kinds[i]:
                continue
            scores = {
                j: score(own_q, own_k, q_block, k_block)
                for j, k_block in enumerate(k_blocks)
                if k_kinds[j]
            }
            kept = row(i, scores)
            for j in scores:
                if j not in kept:
                    out[b, h, torch.tensor(q_block)[:, None], torch.tensor(k_blocks[j])] = False
    return out


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    valid: torch.Tensor | None,
) -> torch.Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    if valid is not None:
        mask = mask & valid[:, None, None]
    logits = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v


def combined(
    query: torch.Tensor, parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """One softmax over (logit, value) pairs of a query."""
    logits = torch.stack([logit for logit, _ in parts])
    return logits.softmax(0) @ torch.stack([value for _, value in parts])


def tokens_of(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block: list[int],
    pool: int,
    valid: list[bool],
    variance: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a query sees of a block: its valid tokens, or means of ``pool`` of them."""
    out = []
    block = [token for token in block if valid[token]]
    for n in range(0, len(block), pool):
        part = block[n : n + pool]
        logit = query @ mean(keys, part) * SCALE + math.log(len(part))
        if variance and len(part) > 1:
            spread = keys[part].var(0, correction=0)
            logit = logit + (query * SCALE).square() @ spread / 2
        out.append((logit, mean(values, part)))
    return out


def whole(layout: TokenLayout, q: torch.Tensor, b: int) -> list[bool]:
    text = lengths(layout)
    if text is None:
        return [True] * layout.length
    own: list[bool] = valid_keys(text, layout)[b].tolist()
    return own


def check_output(
    selector: Selector, oracle: Output, layout: TokenLayout, atol: float = 1e-9
) -> None:
    """The fast form and the oracle of the levels give what the definition does."""
    q, k, v = tensors(layout)
    expected = oracle(q, k, v, layout)
    selection = selector.select(q, k, v, layout, SCALE)
    for run in (attend, reference_attend):
        out, _ = run(q, k, v, selection, layout, lengths(layout), SCALE)
        torch.testing.assert_close(out, expected, rtol=0, atol=atol)
