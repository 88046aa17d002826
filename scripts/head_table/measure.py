"""Errors of patterns on recorded calls, and members of families that execute a given share."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch

import visattn
from head_table.families import BLOCK, Family
from visattn.geometry.layout import Grid, TokenLayout
from visattn.geometry.orders import fitted
from visattn.inject import Observation, observe
from visattn.patterns import HeadPattern, Pattern, Stencil
from visattn.selectors import Agent, Selector
from visattn.selectors.attend.dynamic_blockwise import attend

FITS = 8  # halvings when a share is fitted
SLACK = 1.02  # of the share that may be executed


class Calls(NamedTuple):
    """The calls of a layer, and the output weights of each head ``[H, out, D]``."""

    weights: torch.Tensor
    seen: list[Observation]


class Result(NamedTuple):
    """Error of each head, float32 ``[H]``, and the share of the blocks that was executed."""

    error: torch.Tensor
    executed: float


def record(
    pipe: Any, prompts: tuple[str, ...], steps: tuple[int, ...], shape: dict[str, Any]
) -> list[Calls]:
    """The conditional calls of every layer at some steps, for each prompt."""
    model = pipe.transformer
    layers: dict[str, Calls] = {}

    def keep(call: Observation) -> None:
        if call.step in steps and call.passes == ("cond",):
            if call.layer not in layers:
                weight = model.get_submodule(call.layer).to_out[0].weight
                heads = weight.unflatten(1, (call.q.shape[1], -1)).transpose(0, 1)
                layers[call.layer] = Calls(heads.detach(), [])
            layers[call.layer].seen.append(call)

    with observe(pipe, keep):
        for number, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(number)
            pipe(prompt, generator=generator, output_type="latent", **shape)
    return list(layers.values())


def output(pattern: HeadPattern, call: Observation) -> tuple[torch.Tensor, float]:
    """What a pattern computes of a call, and its executed share."""
    q, k, v, layout = call.q, call.k, call.v, call.layout
    if isinstance(pattern, Selector):
        scale = q.shape[3] ** -0.5
        selection = pattern.select(q, k, v, layout, scale)
        out, _ = attend(q, k, v, selection, layout, None, scale)
        return out, float(selection.block_density().mean())
    return visattn.sparse_attention(q, k, v, pattern, layout), fixed_share(pattern, layout)


def fixed_share(pattern: HeadPattern, layout: TokenLayout) -> float:
    """Executed share of a pattern that no call changes."""
    if isinstance(pattern, Agent):  # queries and keys of the agents' two products
        grid = layout.grids[0][1]
        box = zip(grid.shape, pattern.box, strict=True)
        agents = 1
        for length, side in box:
            agents *= -(-length // side)
        return 2 * agents / grid.numel
    assert isinstance(pattern, Pattern)
    return pattern.lower(layout, BLOCK, BLOCK).block_density


def error(call: Observation, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``|W (o - o')|^2 / |W o|^2`` of each head."""
    exact = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    apart, whole = (
        torch.einsum("hod,bhld->bhlo", weights, x).square().sum((0, 2, 3))
        for x in (exact - out, exact)
    )
    return apart / whole


def measured(pattern: HeadPattern, calls: Calls) -> Result:
    """Means over the calls of a layer."""
    total, executed = torch.zeros(len(calls.weights)), 0.0
    for call in calls.seen:
        out, share = output(pattern, call)
        total += error(call, calls.weights, out)
        executed += share
    return Result(total / len(calls.seen), executed / len(calls.seen))


def fit(family: Family, share: float, layers: list[Calls]) -> tuple[HeadPattern, bool]:
    """The member of a family that executes most within a share, on calls of several layers, and
    True; or the one that executes least, and False."""
    found: dict[HeadPattern, float] = {}
    if callable(family):
        low, high = 0.0, 1.0
        for _ in range(FITS):
            middle = (low + high) / 2
            try:
                member = family(middle)
                found[member] = executed_share(member, layers)
            except ValueError:  # too small for the grid
                low = middle
                continue
            low, high = (middle, high) if found[member] <= share * SLACK else (low, middle)
    else:
        for member in family:
            with suppress(ValueError):  # larger than the grid
                found[member] = executed_share(member, layers)
    within = {member: own for member, own in found.items() if own <= share * SLACK}
    if within:
        return max(within, key=lambda own: within[own]), True
    return min(found, key=lambda own: found[own]), False


def executed_share(pattern: HeadPattern, layers: list[Calls]) -> float:
    """What a pattern executes, of a dynamic one the mean over calls of several layers."""
    if isinstance(pattern, Pattern | Agent):
        return fixed_share(pattern, layers[0].seen[0].layout)
    some = [output(pattern, own.seen[0])[1] for own in layers[::4]]
    return sum(some) / len(some)


def stencils(layers: list[Calls], share: float) -> list[list[Stencil]]:
    """The stencil of every head of every layer: the tile offsets of most mass, up to a share."""
    grid = layers[0].seen[0].layout.grids[0][1]
    tile = fitted((1, 4, 4), grid, BLOCK)
    tiles = Grid(*(-(-n // side) for n, side in zip(grid.shape, tile, strict=True)))
    places = torch.stack(grid.coordinates(torch.arange(grid.numel)), 1) // torch.tensor(tile)
    owner = (places[:, 0] * tiles.height + places[:, 1]) * tiles.width + places[:, 2]
    spots = torch.stack(tiles.coordinates(torch.arange(tiles.numel)), 1)
    apart = (spots[None] - spots[:, None]).reshape(-1, 3)
    offsets, which, count = apart.unique(dim=0, return_inverse=True, return_counts=True)
    out = []
    for calls in layers:
        mass = torch.zeros(len(calls.weights), len(offsets))
        for call in calls.seen:
            logits = call.q[0] @ call.k[0].mT * call.q.shape[3] ** -0.5
            rows = torch.zeros(len(mass), tiles.numel, grid.numel)
            rows.index_add_(1, owner, logits.softmax(-1))
            pairs = torch.zeros(len(mass), tiles.numel, tiles.numel).index_add_(2, owner, rows)
            mass.index_add_(1, which, pairs.flatten(1))
        own = []
        for head in mass:
            kept, used = [(0, 0, 0)], tiles.numel
            for n in (head / count).argsort(descending=True).tolist():
                t, h, w = offsets[n].tolist()
                if (t, h, w) != (0, 0, 0) and used + int(count[n]) <= share * tiles.numel**2:
                    kept.append((t, h, w))
                    used += int(count[n])
            own.append(Stencil(tile, tuple(kept)))
        out.append(own)
    return out


def with_stencils(own: list[Stencil], calls: Calls) -> Result:
    """Of a layer whose heads have a stencil each."""
    parts = [measured(stencil, calls) for stencil in own]
    head = torch.stack([found.error[number] for number, found in enumerate(parts)])
    return Result(head, sum(found.executed for found in parts) / len(parts))


def without_counts(pattern: Selector, calls: Calls) -> Result:
    """As ``measured`` with a pooled rest, whose means count as one key each: no + ln n."""
    total, executed = torch.zeros(len(calls.weights)), 0.0
    for call in calls.seen:
        scale = call.q.shape[3] ** -0.5
        selection = pattern.select(call.q, call.k, call.v, call.layout, scale)
        q_side, k_side = selection.q_side, selection.k_side
        kept = selection.levels == 1
        owner = [torch.zeros(call.layout.length, dtype=torch.long) for _ in range(2)]
        for place, side in zip(owner, (q_side, k_side), strict=True):
            tokens, exists = side.tokens[0, 0], side.exists[0, 0]
            rows = torch.arange(len(tokens))[:, None].expand_as(tokens)
            place[tokens[exists]] = rows[exists]
        seen = kept[:, :, owner[0]]
        exists = k_side.exists[..., None]
        means = [
            (k_side.take(x) * exists).sum(-2) / exists.sum(-2).clamp(min=1)
            for x in (call.k, call.v)
        ]
        own = (call.q @ call.k.mT * scale).masked_fill(~seen[..., owner[1]], -torch.inf)
        pooled = (call.q @ means[0].mT * scale).masked_fill(seen, -torch.inf)
        weights = torch.cat([own, pooled], -1).softmax(-1)
        out = weights @ torch.cat([call.v, means[1]], -2)
        total += error(call, calls.weights, out)
        executed += float(selection.block_density().mean())
    return Result(total / len(calls.seen), executed / len(calls.seen))
