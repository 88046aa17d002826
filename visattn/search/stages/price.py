"""Third stage: measure the error and the seconds of every candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from visattn.inject import Observation, observe
from visattn.inject.layers.stock_attention import dense_attention
from visattn.patterns import Dense, HeadPattern, Skip
from visattn.search.arguments import PromptPair
from visattn.search.measure.latency import (
    HeadLatency,
    LayerLatency,
    heads_run_separately,
    measure,
)
from visattn.search.measure.output_losses import CandidatePool, CandidateScorer
from visattn.search.measure.recorded_attention import SamplePlace, calls_of
from visattn.search.measure.tile_grid import TileGrid
from visattn.search.request import SearchRequest
from visattn.search.solve.price_table import Group, PriceTable, losses_of
from visattn.search.stages.calibrate import Calibrated
from visattn.search.stages.observe import Observed
from visattn.tasks.runner import Task, TaskResult

__all__ = ["Priced", "price"]

STENCILS_TIMED = 10  # of each head
Losses = Mapping[Group, Sequence[tuple[int, SamplePlace, torch.Tensor]]]


@dataclass(frozen=True)
class Priced:
    """The error and the seconds of every candidate.

    Attributes:
        pool: the candidates.
        rules: the dynamic rules with their families, also those that are too slow for the pool.
        grids: the tilings of the stencils.
        timed: the patterns whose seconds were measured.
        table: losses and seconds of every candidate.
        notes: for the receipt.
    """

    pool: CandidatePool
    rules: tuple[tuple[str, HeadPattern], ...]
    grids: tuple[TileGrid, ...]
    timed: tuple[HeadPattern, ...]
    table: PriceTable
    notes: tuple[str, ...]


def price(
    request: SearchRequest, observed: Observed, calibrated: Calibrated, like: Priced | None = None
) -> Priced:
    """Measure the losses of all candidates on the other prompts, and their seconds in a layer.

    Dynamic rules that are slower than dense attention are not candidates. The receipt still
    compares the plan with them.

    Args:
        request: the search.
        observed: result of the first stage.
        calibrated: result of the second stage.
        like: the result at another shape, whose candidates are measured here too; None: choose
            the candidates.

    Raises:
        Unfinished: all generations failed.
    """
    request.candidates.check(observed.layout.grids[0][1], observed.block)
    rules = tuple(request.candidates.dynamic_rules(observed.block)) if like is None else like.rules
    seconds = _measured(request, observed, calibrated, "rules", [rule for _, rule in rules])
    if like is None:
        grids = observed.grids
        fast = [(family, rule) for family, rule in rules if _is_fast(rule, seconds)]
        pool = request.candidates.pool(
            observed.layout, observed.block, grids, calibrated.tables, fast
        )
    else:
        pool = like.pool
        grids = tuple(TileGrid(grid.tile, observed.layout) for grid in like.grids)
    losses = _losses(request, observed, calibrated, pool, grids)
    missing = sorted(
        path
        for layer, path in request.target.paths.items()
        if not any(group[1:] == layer for group in losses)
    )
    untimed = _table(request, observed, pool, losses)
    timed = _worth_timing(untimed) if like is None else like.timed
    seconds = _measured(request, observed, calibrated, "seconds", timed) | seconds
    module = next(iter(request.target.modules.values()))
    sample = torch.empty(1, 1, 1, 64, device=request.target.device, dtype=torch.float32)
    latency = LayerLatency(seconds, int(module.heads), heads_run_separately(sample))
    notes: tuple[str, ...] = ()
    if missing:
        notes = (f"these layers stay dense, as no call could be scored: {', '.join(missing)}",)
    return Priced(pool, rules, grids, tuple(timed), replace(untimed, times=latency), notes)


def _is_fast(rule: HeadPattern, seconds: Mapping[str, HeadLatency]) -> bool:
    """Whether a rule takes less time than dense attention."""
    name = repr(rule)
    return name in seconds and seconds[name].all < seconds[repr(Dense())].all


def _losses(
    request: SearchRequest,
    observed: Observed,
    calibrated: Calibrated,
    pool: CandidatePool,
    grids: Sequence[TileGrid],
) -> Losses:
    """Return the losses of the pool on the prompts to score."""
    settings, target, steps = request.settings, request.target, observed.all_read_steps
    sampled = {"tiles": settings.tiles, "rows": settings.rows, "exact": settings.exact}
    pool_json = pool.json_values(list(calibrated.tables))

    def task(pair: PromptPair) -> Task:
        prompt, seed = pair

        def run() -> TaskResult:
            scorer = CandidateScorer(
                pool,
                target.weights,
                steps,
                grids,
                settings.tiles,
                settings.rows,
                exact=settings.exact,
            )
            with observe(target.pipe, scorer):
                target.generate(prompt, seed)
            return scorer.item()

        question = {"prompt": prompt, "seed": seed, "steps": sorted(steps), "pool": pool_json}
        return Task(question | sampled, f"{prompt!r}, seed {seed}", run)

    results = request.runner.do("score", [task(pair) for pair in request.to_score])
    scored = [result for result in results if result is not None]
    for result in scored:
        request.runner.failures.update(result.value["failures"])
    return losses_of(scored, observed.phase_of)


def _table(
    request: SearchRequest, observed: Observed, pool: CandidatePool, losses: Losses
) -> PriceTable:
    """Return the table of losses, with seconds in proportion to density until they are measured."""
    target, layout = request.target, observed.layout
    seconds = {repr(Dense()): HeadLatency(1.0, 1.0), repr(Skip()): HeadLatency(0.0, 0.0)}
    for stencil in {x for heads in pool.stencils.values() for head in heads for x in head}:
        density = stencil.density(layout)
        seconds[repr(stencil)] = HeadLatency(density, density)
    return PriceTable(
        pool=pool,
        times=LayerLatency(seconds, 1, True),
        calls=losses,
        heads={layer: target.heads(layer) for layer in target.paths},
        paths=target.paths,
        runs=observed.runs,
        generation=observed.seconds,
        layout=layout,
        denoisers=target.denoisers,
        phases=request.phases,
        model=target.name,
    )


def _worth_timing(table: PriceTable) -> list[HeadPattern]:
    """Return all static candidates, and for each head the stencils for which no sparser stencil has
    less loss, about STENCILS_TIMED of them at most."""
    patterns: dict[HeadPattern, None] = dict.fromkeys(
        [*(pattern for _, pattern in table.pool.static), Skip()]
    )
    for group in table.groups:
        for head in range(table.heads[group[1:]]):
            front = table.options(group, head, lambda family, _: family == "stencil")
            candidates = table.candidates(group, head)
            numbers = [option.choice[0] for option in front]
            chosen = [candidates[number][1] for number in numbers if number >= 0]
            step = max(1, -(-len(chosen) // STENCILS_TIMED))
            patterns.update(dict.fromkeys(chosen[::step]))
    return list(patterns)


def _measured(
    request: SearchRequest,
    observed: Observed,
    calibrated: Calibrated,
    stage: str,
    patterns: Sequence[HeadPattern],
) -> dict[str, HeadLatency]:
    """Return the seconds of patterns, and of dense attention, on a call of a layer in the
    middle."""
    target, replay = request.target, calibrated.replay

    def run() -> TaskResult:
        inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        middle = sorted(target.paths)[len(target.paths) // 2]

        def keep(observation: Observation) -> None:
            if (observation.role, observation.number) == middle and not inputs:
                sample = next(calls_of(observation, {int(observation.step or 0)}))
                inputs.append((sample.q[None], sample.k[None], sample.v[None]))

        first = next(n for n, call in enumerate(replay.calls) if call.role == middle[0])
        replay.observed(keep, first)
        q, k, v = inputs[0]
        dense = dense_attention(target.modules[middle])
        times, failures = measure(patterns, q, k, v, observed.layout, dense)
        return {"seconds": {x: list(y) for x, y in times.items()}, "failures": failures}, {}

    question = {"patterns": [repr(pattern) for pattern in patterns]}
    (result,) = request.runner.do(stage, [Task(question, "candidates", run)], alone=True)
    assert result is not None
    request.runner.failures.update(result.value["failures"])
    return {name: HeadLatency(*values) for name, values in result.value["seconds"].items()}
